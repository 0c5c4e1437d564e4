"""One safetensors file: what it holds by its header, and loading it where configurations say how.

The layouts are those that diffusers' `from_single_file` reads: the original (LDM) one, of whole
checkpoints and of components alone, and a component's own state. What architecture a checkpoint is
of is diffusers' finding, by keys and shapes; its configurations are here, so that none is fetched.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.build.source import ARCHITECTURES, shipped_architectures
from engines.errors import CheckpointError, reason_of
from engines.facts import MOTION_ADAPTER
from engines.loras.file import MOTION_KEY

MERGES = ARCHITECTURES / "clip_merges.txt"
# How keys begin, or what is in them, by what a file then is. The first that fits counts.
LORA_KEYS = ("lora_", ".lora.", "_lora.", ".lora_", "hada_w", "lokr_w")
LDM_UNET, LDM_VAE = "model.diffusion_model.", ("first_stage_model.", "vae.")
UNET_KEYS = (LDM_UNET, "down_blocks.", "mid_block.", "up_blocks.")
VAE_KEYS = (*LDM_VAE, "encoder.", "decoder.")
TINY_VAE_KEYS = ("encoder.layers.", "decoder.layers.")
FIRST_CONVOLUTIONS = (f"{LDM_UNET}input_blocks.0.0.weight", "conv_in.weight")
EXTRA_INPUTS = {8: ", two images (editing)"}  # by the input channels of a UNet
INPAINTING = {  # by the repository that diffusers knows: whose configurations are its own but for 9
    "stable-diffusion-inpainting": "stable-diffusion-v1-5",
    "stable-diffusion-2-inpainting": "stable-diffusion-2-1-base",
    "stable-diffusion-xl-1.0-inpainting-0.1": "stable-diffusion-xl-base-1.0",
}
OPTIONS = {
    "lora": "--lora NAME=FILE", "unet": "--unet FILE", "vae": "--vae FILE",
    MOTION_ADAPTER: "--motion-adapter FILE",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says before its weights."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def has(self, *prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in self.shapes)

    @property
    def kind(self) -> str:
        """``lora``, ``checkpoint``, ``motion_adapter``, ``unet``, ``vae``, or empty for what is
        none of them.
        """
        if any(mark in key for key in self.shapes for mark in LORA_KEYS):
            return "lora"
        if self.has(LDM_UNET) and self.has(*LDM_VAE):
            return "checkpoint"
        if any(MOTION_KEY in key for key in self.shapes) and not self.has("time_embedding."):
            return MOTION_ADAPTER
        return "unet" if self.has(*UNET_KEYS) else "vae" if self.has(*VAE_KEYS) else ""

    @property
    def unet_channels(self) -> int:
        """Of the UNet's input; 0: there is none."""
        if self.kind not in ("checkpoint", "unet"):
            return 0
        shapes = (self.shapes[key] for key in FIRST_CONVOLUTIONS if key in self.shapes)
        return next(shapes, (0, 0))[1]

    @property
    def scheduler(self) -> dict[str, Any]:
        """What the file says of its noise: ModelSpec's key, or SDXL trainers' empty tensors."""
        said: dict[str, Any] = {}
        if self.metadata.get("modelspec.prediction_type", "").startswith("v"):
            said["prediction_type"] = "v_prediction"
        elif self.metadata.get("modelspec.prediction_type") == "epsilon":
            said["prediction_type"] = "epsilon"
        if "v_pred" in self.shapes:
            said["prediction_type"] = "v_prediction"
        if "ztsnr" in self.shapes:
            said["rescale_betas_zero_snr"] = True
        return said


def read_header(file: Path) -> Header:
    """Raises CheckpointError where it is no safetensors file, or its UNet wants two images."""
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in keys}
            header = Header(file, shapes, opened.metadata() or {})
    except Exception as error:  # SafetensorError and whatever the system says
        raise CheckpointError(f"{file} is no safetensors file: {reason_of(error)}") from error
    if header.unet_channels in EXTRA_INPUTS:
        raise CheckpointError(f"{file} {strange_input(header.unet_channels)}")
    return header


def strange_input(num_channels: int) -> str:
    """What is said of a UNet that takes more than latents."""
    kind = EXTRA_INPUTS.get(num_channels, "")
    return (
        f"has a UNet with {num_channels} input channels{kind}: only those "
        "that take latents, alone or with a mask and a masked image, are served; use the model "
        "that it was made from"
    )


def architecture_of(header: Header) -> Path:
    """The shipped folder of configurations that diffusers would use for a checkpoint.

    Raises:
        CheckpointError: it is no whole checkpoint, or one whose configurations are not here.
    """
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    _check_whole(header)
    like = {key: torch.empty(shape, device="meta") for key, shape in header.shapes.items()}
    repository: str = fetch_diffusers_config(like)["pretrained_model_name_or_path"]
    name = repository.rpartition("/")[2]
    found = ARCHITECTURES / INPAINTING.get(name, name)
    if not found.is_dir():
        raise CheckpointError(
            f"{header.file} is of the architecture {found.name}; known are "
            f"{shipped_architectures()}: give a diffusers folder with its configurations by "
            "--architecture"
        )
    return found


def _check_whole(header: Header) -> None:
    if header.kind != "checkpoint":
        raise CheckpointError(misplaced(header, "a whole checkpoint", "--model BASE"))


def misplaced(header: Header, wanted: str, base: str) -> str:
    """What is said of a file that is something else than ``wanted``."""
    names = {
        "lora": "a LoRA", "unet": "a UNet alone", "vae": "a VAE alone",
        MOTION_ADAPTER: "a motion adapter",
    }  # fmt: skip
    if header.kind in names:
        return (
            f"{header.file} is {names[header.kind]}, not {wanted}: give it by "
            f"{OPTIONS[header.kind]} on {base}"
        )
    if header.kind == "checkpoint":
        return f"{header.file} is a whole checkpoint, not {wanted}: give it by --model FILE"
    first = next(iter(header.shapes), "nothing")
    return f"{header.file} holds {first} and so on, which is not {wanted} in a layout known here"


def load_checkpoint(
    file: Path, pipeline_class: str, architecture: Path, given: Mapping[str, Any], dtype: Any
) -> Any:
    """The diffusers pipeline of a single file; ``given`` are components that are not read from it.

    Raises:
        CheckpointError: the file is no checkpoint, or of another architecture.
    """
    import diffusers

    header = read_header(file)
    _check_whole(header)
    try:
        if header.unet_channels == 9 and "unet" not in given:  # the configurations may say 4
            unet = diffusers.UNet2DConditionModel.from_single_file(
                str(file),
                config=str(architecture),
                subfolder="unet",
                dtype=dtype,
                local_files_only=True,
                in_channels=9,
            )
            given = {**given, "unet": unet}
        pipeline = getattr(diffusers, pipeline_class).from_single_file(
            str(file),
            config=str(architecture),
            dtype=dtype,
            local_files_only=True,
            **_tokenizers(architecture),
            **given,
        )
    except Exception as error:  # diffusers raises many kinds; all mean the same here
        raise CheckpointError(
            f"{file} cannot be loaded by diffusers as {architecture.name}: {reason_of(error)}; "
            "give a diffusers folder with configurations that fit it by --architecture"
        ) from error
    for name, component in pipeline.components.items():
        if not hasattr(component, "named_parameters"):
            continue
        if absent := [key for key, value in component.named_parameters() if value.is_meta]:
            raise CheckpointError(f"{file} has no weights of {name}.{absent[0]}")
    pipeline.scheduler.register_to_config(**header.scheduler)
    return pipeline


def _tokenizers(architecture: Path) -> dict[str, Any]:
    """CLIP's, for folders that leave its vocabulary to this package."""
    from transformers import CLIPTokenizer

    found = {}
    for config in architecture.glob("tokenizer*/tokenizer_config.json"):
        if {path.name for path in config.parent.iterdir()} == {config.name}:
            options = json.loads(config.read_text())
            vocabulary, merges = _clip_vocabulary()
            found[config.parent.name] = CLIPTokenizer(
                vocab=vocabulary,
                merges=merges,
                model_max_length=options["model_max_length"],
                pad_token=options["pad_token"],
            )
    return found


@functools.cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token → id, and merges, in the order that CLIP's `SimpleTokenizer` gives them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = [line.split() for line in MERGES.read_text().splitlines()]
    merges = [(left, right) for left, right in lines]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges
