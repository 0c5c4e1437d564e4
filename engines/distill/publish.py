"""Assembles trained parts into diffusers folders, half precision, as users download them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from engines.distill.consistency import NUM_SOLVER_STEPS
from engines.distill.networks import NOISE, noise_schedule
from engines.distill.tokenizer import build_tokenizer
from engines.distill.training import TrainingError
from engines.distill.world import LOOKS

LORAS = ("lcm-lora", *(f"{look}-lora" for look in LOOKS))
_MACHINE_KEYS = ("_name_or_path",)  # where a part was loaded from is nobody's business


def publish(work: Path, out: Path) -> list[str]:
    """Write every model whose parts the work folder has into ``out``; returns their names.

    `demo-base`, `demo-lcm` and `demo-motion` become pipelines, the tiny autoencoder is halved,
    LoRAs and critic are copied. Each folder is replaced whole.
    """
    written = []
    if (work / "unet").exists():
        options = {"safety_checker": None, "feature_extractor": None}
        base = StableDiffusionPipeline(
            **_parts(work, "unet"), scheduler=noise_schedule(),
            requires_safety_checker=False, **options,
        )  # fmt: skip
        written.append(_save(base, out / "demo-base"))
    if (work / "unet-lcm").exists():
        lcm = LatentConsistencyModelPipeline(
            **_parts(work, "unet-lcm"), scheduler=_lcm_schedule(),
            requires_safety_checker=False, **options,
        )  # fmt: skip
        written.append(_save(lcm, out / "demo-lcm"))
    for name in LORAS:
        if (work / name).exists():
            _replace(work / name, out / f"demo-{name}")
            written.append(f"demo-{name}")
    if (work / "tiny-vae").exists():
        sharp = work / "tiny-vae-sharp"
        trained = sharp if sharp.exists() else work / "tiny-vae"
        tiny = AutoencoderTiny.from_pretrained(trained, torch_dtype=torch.float16)
        written.append(_save(tiny, out / "demo-tiny-vae"))
    if (work / "motion-adapter").exists():
        written.append(_save(_Clips(work), out / "demo-motion"))
    if (work / "critic").exists():
        _replace(work / "critic", out / "critic")
        written.append("critic")
    if not written:
        raise TrainingError(f"--work {work} has no finished model; run `fourstep distill all`")
    return written


def _parts(work: Path, unet: str) -> dict[str, Any]:
    sharp = work / "vae-sharp"
    half = {"torch_dtype": torch.float16}
    return {
        "vae": AutoencoderKL.from_pretrained(sharp if sharp.exists() else work / "vae", **half),
        "text_encoder": CLIPTextModel.from_pretrained(work / "text", **half),
        "tokenizer": build_tokenizer(),
        "unet": UNet2DConditionModel.from_pretrained(work / unet, **half),
    }


class _Clips:
    """What diffusers calls an AnimateDiffPipeline: the student's UNet and an adapter, side by side.

    The pipeline itself would put the adapter into the UNet, for which it has no room: see
    `engines.motion_unet`.
    """

    def __init__(self, work: Path) -> None:
        self._parts = _parts(work, "unet-lcm") | {
            "motion_adapter": MotionAdapter.from_pretrained(
                work / "motion-adapter", torch_dtype=torch.float16
            ),
            "scheduler": _lcm_schedule(),
        }

    def save_pretrained(self, folder: Path, *, safe_serialization: bool) -> None:
        """As diffusers writes a pipeline."""
        assert safe_serialization
        for name, part in self._parts.items():
            part.save_pretrained(folder / name)
        index: dict[str, Any] = {"_class_name": "AnimateDiffPipeline"}
        index |= {"_diffusers_version": diffusers.__version__}
        for name, part in self._parts.items():
            library = type(part).__module__.split(".")[0]
            index[name] = [library, type(part).__name__]
        index |= dict.fromkeys(("feature_extractor", "image_encoder"), (None, None))
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model_index.json").write_text(f"{text}\n")


def _lcm_schedule() -> Any:
    return LCMScheduler(**NOISE, original_inference_steps=NUM_SOLVER_STEPS)


def _save(model: Any, folder: Path) -> str:
    """Of a pipeline or a part of one."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, safe_serialization=True)
    for file in partial.rglob("*.json"):
        values = json.loads(file.read_text())
        if isinstance(values, dict) and any(values.pop(key, None) for key in _MACHINE_KEYS):
            file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    _replace(partial, folder)
    shutil.rmtree(partial)
    return folder.name


def _replace(source: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
