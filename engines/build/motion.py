"""Motion modules of AnimateDiff: what a file of them is shaped like, and putting them into a UNet.

A checkpoint of pictures becomes one of clips so, as diffusers' ``AnimateDiffPipeline`` makes it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.build.folder import read_json
from engines.errors import CheckpointError
from engines.facts import MOTION_ADAPTER

if TYPE_CHECKING:
    from engines.build.single_file import Header

MODULE = re.compile(r"(down|up)_blocks\.(\d+)\.motion_modules\.(\d+)\.")
LAYER = re.compile(r"motion_modules\.\d+\..*transformer_blocks\.(\d+)\.")


def takes_adapter(pipeline_class: str) -> bool:
    """Whether a motion adapter can be put on a pipeline of this class."""
    from engines.families import animatediff, stable_diffusion

    return pipeline_class in (*stable_diffusion.PIPELINES, *animatediff.PIPELINES)


def has_motion(index: Any) -> bool:
    """Whether the UNet that a ``model_index.json`` names has motion modules of its own."""
    entry = index.get("unet")
    return isinstance(entry, list) and entry[-1] == "UNetMotionModel"


def is_of_clips(index: Any) -> bool:
    """Whether a ``model_index.json`` names a pipeline of clips."""
    from engines.families import animatediff

    return index.get("_class_name") in animatediff.PIPELINES


def of_file(header: Header, dtype: Any) -> Any:
    """The ``MotionAdapter`` of one file, in diffusers' own names or the original's.

    A file has no configuration; its shapes say all but the number of heads, which is 8 in every
    adapter that there is (diffusers' default).

    Raises:
        CheckpointError: the shapes are of no adapter.
    """
    from diffusers import MotionAdapter
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
    from safetensors.torch import load_file

    shapes = {key.removeprefix("module."): shape for key, shape in header.shapes.items()}
    found = {match.groups() for key in shapes if (match := MODULE.match(key))}
    channels, layers = [], []
    for block in range(1 + max((int(b) for way, b, _ in found if way == "down"), default=-1)):
        norms = [f"down_blocks.{block}.motion_modules.0.{mid}norm.weight" for mid in
                 ("", "temporal_transformer.")]  # fmt: skip
        channels += [shapes[norm][0] for norm in norms if norm in shapes]
        layers.append(sum(way == "down" and b == str(block) for way, b, _ in found))
    depths = {int(match[1]) for key in shapes if (match := LAYER.search(key))}
    lengths = {shape[1] for key, shape in shapes.items() if key.endswith(".pe")}  # [1, F, C]
    if not depths or len(channels) != len(layers) or len(lengths) > 1:
        raise CheckpointError(
            f"{MOTION_ADAPTER} {header.file} has the shapes of no AnimateDiff adapter that "
            "diffusers knows; give it as a folder with its config.json"
        )
    adapter = MotionAdapter(
        block_out_channels=tuple(channels),
        motion_layers_per_block=tuple(layers),
        motion_transformer_layers_per_block=max(depths) + 1,
        motion_max_seq_length=next(iter(lengths), 32),
        use_motion_mid_block=header.has("mid_block.", "module.mid_block."),
    )
    state = {key.removeprefix("module."): value for key, value in load_file(header.file).items()}
    if any(".temporal_transformer." in key for key in state):
        state = convert_animatediff_checkpoint_to_diffusers(state)
    missing, unexpected = adapter.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(key for key in missing if not key.endswith(".pe"))]  # these are fixed
    if wrong:
        raise CheckpointError(
            f"{MOTION_ADAPTER} {header.file} is not laid out as an AnimateDiff adapter: {wrong[0]} "
            "is missing or of no use"
        )
    return adapter.to(dtype).eval()


def apart(folder: Path, own: Collection[str]) -> dict[str, Path]:
    """What a folder of clips has in two halves: the places of its UNet of pictures and its adapter,
    of those that are its ``own``. Neither, where its UNet has motion modules.
    """
    index = read_json(folder / "model_index.json")
    if not is_of_clips(index) or ("unet" in own and has_motion(index)):
        return {}
    return {name: folder / name for name in ("unet", MOTION_ADAPTER) if name in own}


def with_motion(pipeline: Any, adapter: Any, source: Path) -> Any:
    """The pipeline of clips: its UNet with the modules of ``adapter``; without one, as it is.

    Motion modules were trained on linear betas, so the scheduler of a checkpoint of pictures gets
    them. ``source`` is where ``adapter`` came from.

    Raises:
        CheckpointError: the adapter was made for another UNet.
    """
    from diffusers import AnimateDiffPipeline

    from engines.motion_unet import join

    if adapter is None:
        return pipeline
    _check_fit(adapter, pipeline.unet, source)
    of_clips = isinstance(pipeline, AnimateDiffPipeline)
    if pipeline.unet.config.time_cond_proj_dim and not of_clips:
        raise CheckpointError(
            f"{MOTION_ADAPTER} {source} is put on a UNet with a guidance embedding (an LCM), which "
            "no adapter by itself was made for: put it on a plain Stable Diffusion checkpoint and "
            "add AnimateLCM's own LoRA by --lora, or give a folder of both that were trained "
            "together"
        )
    unet = join(pipeline.unet, adapter)
    if of_clips:
        pipeline.register_modules(unet=unet, motion_adapter=None)
        return pipeline
    pipeline.scheduler.register_to_config(beta_schedule="linear")
    return AnimateDiffPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=unet,
        motion_adapter=None,
        scheduler=pipeline.scheduler,
    )


def _check_fit(adapter: Any, unet: Any, source: Path) -> None:
    from engines.motion_unet import KNOWN_ADDITIONS

    if adapter.config.conv_in_channels:
        raise CheckpointError(
            f"{MOTION_ADAPTER} {source} is PIA's, whose UNet sees a picture beside the latents: "
            "clips are drawn from text alone, use an adapter without conv_in"
        )
    if unet.config.addition_embed_type not in KNOWN_ADDITIONS:
        raise CheckpointError(
            f"{MOTION_ADAPTER} {source} is put on a UNet with {unet.config.addition_embed_type!r} "
            "conditioning, which clips are drawn without: use a Stable Diffusion 1.x checkpoint"
        )
    made_for, has = (
        (tuple(config["block_out_channels"]), _layers(config, key))
        for config, key in (
            (adapter.config, "motion_layers_per_block"), (unet.config, "layers_per_block"),
        )
    )  # fmt: skip
    if made_for != has:
        raise CheckpointError(
            f"{MOTION_ADAPTER} {source} was made for a UNet of {_say(made_for)}, this model's has "
            f"{_say(has)}: use one made for it (those of SD 1.5 fit no SDXL, and the other way "
            "round)"
        )


def _layers(config: Any, key: str) -> tuple[int, ...]:
    layers, blocks = config[key], len(config["block_out_channels"])
    return (layers,) * blocks if isinstance(layers, int) else tuple(layers)


def _say(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    channels, layers = (", ".join(map(str, each)) for each in shape)
    return f"blocks of {channels} channels with {layers} layers"
