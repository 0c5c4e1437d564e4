"""Real models' exact architectures, end to end: made, built, drawn; time, size and memory kept.

By hand, with the figures as a Markdown table on stdout:

    python -m tests.engines.test_real_size sd15-lcm|sdxl|pixart|pixart-whole|animatelcm [FOLDER]
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from safetensors import safe_open

FOURSTEP = str(Path(sys.executable).with_name("fourstep"))


@dataclass(frozen=True)
class Architecture:
    """What is made of one, and within which memory."""

    maker: str  # of `tests.engines.real_size`
    size: str
    precisions: Sequence[str]  # of bundles for ONNX Runtime
    draw: Sequence[str]  # options of `fourstep generate`
    drawn_from: str  # the folder of a bundle, or of the checkpoint itself
    plans: Sequence[str] | None  # options of `fourstep build`; None: there is no memory for them
    max_peak_gb: float
    denoiser: str = "unet"  # of the pipeline
    image: str = "image.png"


ARCHITECTURES = {
    "sd15-lcm": Architecture(
        maker="make_sd15_lcm",
        size="512x512",
        precisions=("fp32", "fp16"),
        draw=(),
        drawn_from="fp32",
        plans=("--max-batch", "4"),
        max_peak_gb=14.0,
    ),
    "sdxl": Architecture(
        maker="make_sdxl",
        size="1024x1024",
        precisions=("fp16",),
        draw=("--guidance", "1", "--engine", "torch", "--precision", "bf16"),
        drawn_from="sdxl-random",
        plans=("--max-batch", "1"),
        max_peak_gb=22.0,
    ),
    "pixart": Architecture(
        maker="make_pixart",
        size="1024x1024",
        precisions=("fp16",),
        draw=("--engine", "torch", "--precision", "bf16"),
        drawn_from="pixart-random",
        plans=("--max-batch", "1"),
        max_peak_gb=12.0,
        denoiser="transformer",
    ),
    "pixart-whole": Architecture(
        maker="make_pixart_whole",
        size="1024x1024",
        precisions=("fp16",),
        draw=("--engine", "torch", "--precision", "bf16", "--steps", "1"),
        drawn_from="pixart-whole-random",
        plans=None,
        max_peak_gb=22.0,
        denoiser="transformer",
    ),
    "animatelcm": Architecture(
        maker="make_animatelcm",
        size="512x512",
        precisions=("fp16",),
        draw=(
            "--engine",
            "torch",
            "--precision",
            "bf16",
            "--steps",
            "1",
            "--num-frames",
            "4",
            "--guidance",
            "1",
        ),
        drawn_from="animatelcm-random",
        plans=("--max-batch", "2"),  # the lanes of a guided clip
        max_peak_gb=22.0,
        image="image.webp",
    ),
}


@dataclass(frozen=True)
class Measured:
    """One process: its wall time, its own peak memory and what it left on disk."""

    stage: str
    seconds: float
    peak_gb: float
    disk_gb: float


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


def run_all(name: str, folder: Path) -> list[Measured]:
    """Every stage in a process of its own: checkpoint, bundles, plans, image."""
    wanted = ARCHITECTURES[name]
    source, plans, image = folder / f"{name}-random", folder / "plans", folder / wanted.image
    make = [sys.executable, "-m", "tests.engines.test_real_size", "--make", name, str(source)]
    results = [measure("make the checkpoint (fp16)", make, source)]
    builds = [(folder / precision, ["--precision", precision]) for precision in wanted.precisions]
    if wanted.plans is not None:
        options = ["--precision", "fp16", "--engine", "tensorrt-rtx", "--size", wanted.size]
        builds.append((plans, [*options, *wanted.plans, "--compute-capability", "89"]))
    for out, options in builds:
        stage = f"`fourstep build {' '.join(options)}`"
        build = [FOURSTEP, "build", str(source), *options, "--out", str(out)]
        results.append(measure(stage, build, out))
    options = ["--size", wanted.size, "--steps", "4", *wanted.draw]
    stage = f"`fourstep generate {' '.join(options)}` of {wanted.drawn_from}"
    options += ["--model", str(folder / wanted.drawn_from)]
    draw = [FOURSTEP, "generate", "a lighthouse in a storm", *options]
    results.append(measure(stage, [*draw, "-o", str(image)], image))
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
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_size(name: str, tmp_path: Path) -> None:
    from PIL import Image

    wanted = ARCHITECTURES[name]
    results = run_all(name, tmp_path)
    print(as_table(results))
    assert all(result.peak_gb < wanted.max_peak_gb for result in results)
    weights = weights_of(tmp_path / f"{name}-random", wanted.denoiser)
    with_plans = ["plans"] if wanted.plans is not None else []
    for bundle in (*wanted.precisions, *with_plans):
        graph = onnx.load(tmp_path / bundle / "denoiser.onnx", load_external_data=False).graph
        assert weights <= {weight.name for weight in graph.initializer}, bundle
    for bundle in with_plans:
        made = list((tmp_path / bundle).iterdir())
        compiled, exported = (
            {path.stem for path in made if path.suffix == kind} for kind in (".plan", ".onnx")
        )
        assert "denoiser" in compiled
        assert compiled == exported
    with Image.open(tmp_path / wanted.image) as image:
        assert f"{image.width}x{image.height}" == wanted.size
        assert any(low != high for low, high in image.getextrema())
    shutil.rmtree(tmp_path)


def weights_of(folder: Path, component: str) -> set[str]:
    """The names of a diffusers folder's, as an exported denoiser has them."""
    names: set[str] = set()
    for file in (folder / component).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= {f"{component}.{name}" for name in opened.keys()}  # noqa: SIM118 (no mapping)
    return names


if __name__ == "__main__":
    from tests.engines import real_size

    if sys.argv[1] == "--make":
        getattr(real_size, ARCHITECTURES[sys.argv[2]].maker)(Path(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory(dir=sys.argv[2] if sys.argv[2:] else None) as scratch:
            print(as_table(run_all(sys.argv[1], Path(scratch))))
