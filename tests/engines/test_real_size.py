"""The exact SD 1.5 LCM architecture, end to end: made, built, drawn; time, size and memory kept.

By hand, with the figures as a Markdown table on stdout:

    python -m tests.engines.test_real_size [FOLDER]
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

MAX_PEAK_GB = 14.0
NUM_UNET_WEIGHTS = 687  # names of the UNet with its guidance embedding
PLANS = [
    "--engine", "tensorrt-rtx", "--size", "512x512", "--max-batch", "4",
    "--compute-capability", "89",
]  # fmt: skip
FOURSTEP = str(Path(sys.executable).with_name("fourstep"))
NUM_PARAMETERS = 859_600_000  # of the published UNet, guidance embedding included, to 0.1 %


@dataclass(frozen=True)
class Measured:
    """One process: its wall time, its own peak memory and what it left on disk."""

    stage: str
    seconds: float
    peak_gb: float
    disk_gb: float


def make_real_size(folder: Path) -> None:
    """Write a random checkpoint with the configs of LCM Dreamshaper v7 (SD 1.5), in fp16."""
    import torch
    from diffusers import (
        AutoencoderKL,
        LatentConsistencyModelPipeline,
        LCMScheduler,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.engines.checkpoints import SCHEDULE, make_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-vocabulary"), 77)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
            hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, time_cond_proj_dim=256,
    )  # fmt: skip
    count = sum(weight.numel() for weight in unet.parameters())
    assert abs(count - NUM_PARAMETERS) < 1e-3 * NUM_PARAMETERS, count
    vae = AutoencoderKL(
        sample_size=512, latent_channels=4, block_out_channels=(128, 256, 512, 512),
        layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    LatentConsistencyModelPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=LCMScheduler(**SCHEDULE), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def measure(stage: str, command: list[str], made: Path) -> Measured:
    """Run one process to its end and read its own peak from the kernel's account of it."""
    begun = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{stage} ended with exit code {process.returncode}: {command}")
    files = [made] if made.is_file() else [path for path in made.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return Measured(
        stage, time.monotonic() - begun, usage.ru_maxrss * 1024 / 1e9, size / 1e9
    )  # ru_maxrss is in KiB


def run_all(folder: Path) -> list[Measured]:
    """Every stage in a process of its own: checkpoint, build, image (and once more, for fp16)."""
    source, bundle = folder / "sd15-lcm-random", folder / "bundle-fp32"
    half, plans = folder / "bundle-fp16", folder / "bundle-plans"
    image = folder / "image.png"
    make = [sys.executable, "-m", "tests.engines.test_real_size", "--make", str(source)]
    draw = ["generate", "a lighthouse in a storm", "--size", "512x512", "--steps", "4"]
    results = [measure("make the checkpoint (fp16)", make, source)]
    for precision, out, options in (
        ("fp32", bundle, []),
        ("fp16", half, []),
        ("fp16", plans, PLANS),
    ):
        stage = " ".join(["fourstep build --precision", precision, *options])
        build = [FOURSTEP, "build", str(source), "--precision", precision, "--out", str(out)]
        results.append(measure(f"`{stage}`", [*build, *options], out))
    command = [FOURSTEP, *draw, "--model", str(bundle), "-o", str(image)]
    results.append(measure("`fourstep generate` 512x512, 4 steps, fp32", command, image))
    return results


def as_table(results: list[Measured]) -> str:
    """Markdown, one line for each process."""
    lines = [
        f"{os.cpu_count()} cores, {platform.machine()}, {time.strftime('%Y-%m-%d', time.gmtime())}",
        "",
        "| process | time | peak memory | on disk |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.stage} | {r.seconds:.0f} s | {r.peak_gb:.1f} GB | {r.disk_gb:.2f} GB |"
        for r in results
    ]
    return "\n".join(lines)


@pytest.mark.slow
def test_real_size(tmp_path: Path) -> None:
    from PIL import Image

    results = run_all(tmp_path)
    print(as_table(results))
    assert all(result.peak_gb < MAX_PEAK_GB for result in results)
    for bundle in ("bundle-fp32", "bundle-fp16", "bundle-plans"):
        graph = onnx.load(tmp_path / bundle / "denoiser.onnx", load_external_data=False).graph
        names = {weight.name for weight in graph.initializer if weight.name.startswith("unet.")}
        assert len(names) == NUM_UNET_WEIGHTS, bundle
    assert len(list((tmp_path / "bundle-plans").glob("*.plan"))) == 4
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (512, 512)
        assert any(low != high for low, high in image.getextrema())
    shutil.rmtree(tmp_path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_real_size(Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as scratch:
            print(as_table(run_all(Path(scratch))))
