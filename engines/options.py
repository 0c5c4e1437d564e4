"""What the commands have in common: their options, and what the text of one means."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(help="Diffusers folder, safetensors file, bundle, hub id or a shipped name."),
]
CacheOption = Annotated[
    Path, typer.Option(help="Where bundles and their graphs are kept.", envvar="FOURSTEP_CACHE_DIR")
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="auto, onnxruntime, openvino, torch, tensorrt or tensorrt-rtx.",
        envvar="FOURSTEP_ENGINE",
    ),
]
PrecisionOption = Annotated[
    str, typer.Option(help="auto, fp32, fp16, bf16, int8 or fp8.", envvar="FOURSTEP_PRECISION")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="FOURSTEP_DEVICE")]
SamplerOption = Annotated[str, typer.Option(help="Default sampler; empty: the model's.")]
StepsOption = Annotated[
    int, typer.Option(min=0, max=1000, help="Default denoise calls; 0: the model's.")
]
TimestepsOption = Annotated[
    str, typer.Option(help="Default timesteps, as 999,749,499,249; empty: as the sampler has them.")
]
GuidanceOption = Annotated[
    float | None, typer.Option(min=0, max=50, help="Default guidance scale; none: the model's.")
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=FILE or NAME=FILE@WEIGHT, a LoRA to draw with, a file or hub id; repeat for "
        "several."
    ),
]
UnetOption = Annotated[
    str,
    typer.Option(
        help="UNet in place of the model's: folder, file or hub id.", envvar="FOURSTEP_UNET"
    ),
]
VaeOption = Annotated[
    str,
    typer.Option(
        help="VAE in place of the model's: folder, file or hub id.", envvar="FOURSTEP_VAE"
    ),
]
TinyVaeOption = Annotated[
    str,
    typer.Option(
        help="Tiny VAE (TAESD) beside the model's, as a second decoder: folder, file or hub id.",
        envvar="FOURSTEP_TINY_VAE",
    ),
]
MotionOption = Annotated[
    str,
    typer.Option(
        help="Motion adapter (AnimateDiff, AnimateLCM) that makes Stable Diffusion draw clips: "
        "folder, file or hub id.",
        envvar="FOURSTEP_MOTION_ADAPTER",
    ),
]
T5Option = Annotated[
    bool,
    typer.Option(
        help="The linear layers of a T5 encoder (PixArt) in 8 bits.", envvar="FOURSTEP_T5_INT8"
    ),
]
TilingOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Images with a longer side are decoded in tiles of so many pixels a side; 0: whole.",
        envvar="FOURSTEP_VAE_TILING_PX",
    ),
]
DecoderOption = Annotated[str, typer.Option(help="Default decoder: full or tiny.")]
EmbeddingOption = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=FILE, a textual inversion that a prompt names, a file or hub id; repeatable."
    ),
]
SchedulerOption = Annotated[
    list[str] | None,
    typer.Option(
        help="KEY=VALUE, an option of the scheduler's config over the model's own, as "
        "timestep_spacing=trailing; repeatable."
    ),
]
ArchitectureOption = Annotated[
    str,
    typer.Option(
        help="Of a single file that is none of the known: a diffusers folder of configurations.",
        envvar="FOURSTEP_ARCHITECTURE",
    ),
]


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"{option} is {value!r}; use {', '.join(allowed)}")


def parse_timesteps(text: str) -> tuple[int, ...] | None:
    """Whole numbers with commas between them; of no text None."""
    try:
        return tuple(int(each) for each in text.split(",")) if text else None
    except ValueError:
        raise typer.BadParameter(
            f"--timesteps is {text!r}; write whole numbers, as 999,749,499,249"
        ) from None


def parse_options(texts: list[str] | None) -> dict[str, Any]:
    """Options by name; values as JSON has them, or text."""
    options: dict[str, Any] = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        if not (name and value) or name in options:
            raise typer.BadParameter(
                f"--scheduler is {text!r}; write it as KEY=VALUE, each key once"
            )
        try:
            options[name] = json.loads(value.lower())
        except ValueError:
            options[name] = value
    return options


def parse_loras(texts: list[str] | None) -> tuple[dict[str, str], dict[str, float]]:
    """Files or hub ids by name, and the weights of those that say one."""
    paths: dict[str, str] = {}
    weights: dict[str, float] = {}
    for text in texts or ():
        name, found, rest = text.partition("=")
        if not (found and name and rest) or name in paths:
            raise typer.BadParameter(
                f"--lora is {text!r}; write it as NAME=FILE or NAME=FILE@WEIGHT, each name once"
            )
        paths[name], weight = parse_weighted(rest)
        if weight is not None:
            weights[name] = weight
    return paths, weights


def parse_embeddings(texts: list[str] | None) -> dict[str, str]:
    """Files or hub ids by the word that a prompt names them by."""
    paths: dict[str, str] = {}
    for text in texts or ():
        name, _, path = text.partition("=")
        if not (name and path) or name in paths:
            raise typer.BadParameter(
                f"--embedding is {text!r}; write it as NAME=FILE, each name once"
            )
        paths[name] = path
    return paths


def parse_weighted(text: str) -> tuple[str, float | None]:
    """FILE or FILE@WEIGHT; a path may have an @ of its own."""
    path, _, weight = text.rpartition("@")
    if Path(text).expanduser().exists() or not path or "/" in weight:
        return text, None
    try:
        strength = float(weight)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise typer.BadParameter(
            f"--lora has the weight {weight!r}, which is no number; write FILE@WEIGHT"
        )
    return path, strength


def parse_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels."""
    width, found, height = text.partition("x")
    if not (found and width.isdigit() and height.isdigit()):
        raise typer.BadParameter(f"--size is {text!r}; write it as 512x512")
    return int(width), int(height)
