"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(help="Diffusers folder, safetensors file, bundle, hub id or a shipped name."),
]
CacheOption = Annotated[
    Path, typer.Option(help="Where built bundles are kept.", envvar="FOURSTEP_CACHE_DIR")
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="auto, onnxruntime, torch, tensorrt or tensorrt-rtx.", envvar="FOURSTEP_ENGINE"
    ),
]
PrecisionOption = Annotated[
    str, typer.Option(help="auto, fp32, fp16 or bf16.", envvar="FOURSTEP_PRECISION")
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
TilingOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Images with a longer side are decoded in tiles of so many pixels a side; 0: whole.",
        envvar="FOURSTEP_VAE_TILING_PX",
    ),
]
DecoderOption = Annotated[str, typer.Option(help="Default decoder: full or tiny.")]
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
