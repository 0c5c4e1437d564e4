"""What a loaded model says of itself, and which recipes it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.drawing.batching import decode_rows
from engines.drawing.model import Model
from engines.drawing.weighting import runs_of
from engines.errors import InvalidInput
from engines.facts import Facts
from engines.families.recipe import Recipe
from engines.samplers import NoiseSchedule, default_sampler, samplers_of
from engines.samplers.defaults import check_decoder


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What callers may ask of the model; sizes in pixels."""

    model_id: str
    family: str
    backend: str
    backend_reason: str
    precision: str
    default_width: int
    default_height: int
    size_multiple: int
    min_size_px: int
    max_size_px: int
    max_tokens: int  # of one window of the text encoder, marks of begin and end included
    max_chunks: int  # windows that a prompt may fill
    guidance_embedding: bool
    size_conditioning: bool  # SDXL's
    scheduler: str | None  # diffusers' class that the checkpoint names, where that is known
    default_sampler: str
    stands_in: bool  # the default sampler, for a scheduler that is none of ours
    default_num_steps: int
    default_timesteps: tuple[int, ...] | None  # of so many steps with this sampler
    default_guidance_scale: float
    samplers: tuple[str, ...]
    loras: tuple[str, ...]
    max_batch: int
    max_decode_batch: int
    max_calls: int  # engine calls that run side by side
    components: Mapping[str, str]  # names of what stands in for the checkpoint's own, or beside
    decoders: tuple[str, ...]
    encoders: tuple[str, ...]
    default_decoder: str
    embeddings: Mapping[str, str]  # names of files that words of a prompt stand for, by word
    default_num_frames: int  # of a clip; 1 where pictures are drawn, as the most is
    max_num_frames: int
    frames_per_second: int  # at which clips are shown; 0: it draws pictures

    @property
    def draws_clips(self) -> bool:
        """Whether what it draws has an axis of frames, be they one."""
        return self.frames_per_second > 0

    def timesteps_for(self, sampler: str, num_steps: int) -> tuple[int, ...] | None:
        """Where a row draws that names no timesteps; None: as the sampler spaces them."""
        pinned_for = (self.default_sampler, self.default_num_steps)
        return self.default_timesteps if (sampler, num_steps) == pinned_for else None


def describe(model: Model, max_batch: int | None, model_id: str | None) -> ModelInfo:
    """What is said of a loaded model; None leaves batch and name to it."""
    facts = model.facts
    noise = NoiseSchedule.from_config(facts.scheduler)
    stand_in = facts.scheduler_class and default_sampler(noise) == (facts.default_sampler, True)
    lanes = model.batch_for(max_batch)
    return ModelInfo(
        model_id=model_id or facts.name,
        family=facts.family,
        backend=model.choice.backend,
        backend_reason=model.choice.reason,
        precision=model.precision,
        default_width=facts.default_size_px,
        default_height=facts.default_size_px,
        size_multiple=facts.size_multiple_px,
        min_size_px=facts.min_size_px,
        max_size_px=facts.max_size_px,
        max_tokens=facts.max_tokens,
        max_chunks=model.max_chunks,
        guidance_embedding=facts.time_cond_dim > 0,
        size_conditioning=model.family.SIZE_CONDITIONING,
        scheduler=facts.scheduler_class,
        default_sampler=facts.default_sampler,
        stands_in=bool(stand_in),
        default_num_steps=facts.default_num_steps,
        default_timesteps=facts.default_timesteps,
        default_guidance_scale=facts.default_guidance_scale,
        samplers=samplers_of(noise),
        loras=model.adapters.names,
        max_batch=lanes,
        max_decode_batch=decode_rows(model.device, facts.default_size_px, lanes),
        max_calls=model.max_calls,
        components=facts.components,
        decoders=facts.decoders,
        encoders=facts.encoders,
        default_decoder=facts.default_decoder,
        embeddings=facts.embeddings,
        default_num_frames=facts.default_num_frames,
        max_num_frames=facts.max_num_frames,
        frames_per_second=facts.frames_per_second,
    )


def check_recipe(recipe: Recipe, model: Model) -> None:
    """Raise `InvalidInput` for what no sampler could make good."""
    facts, target = model.facts, model.target
    for name, side in (("width_px", recipe.width_px), ("height_px", recipe.height_px)):
        step = facts.size_multiple_px
        if side % step or not facts.min_size_px <= side <= facts.max_size_px:
            raise InvalidInput(
                name,
                side,
                f"{name} is {side}; it must be a multiple of {step} from "
                f"{facts.min_size_px} to {facts.max_size_px}",
            )
    drawn = facts.drawn_size(recipe.width_px, recipe.height_px, recipe.image is not None)
    if target and not target.takes(*drawn):
        size = f"{recipe.width_px}x{recipe.height_px}"
        width, height = drawn
        at = "" if f"{width}x{height}" == size else f", which is drawn at {width}x{height}"
        built = ", ".join(f"{width}x{height}" for width, height in target.sizes_px)
        raise InvalidInput(
            "width_px", size, f"size is {size}{at}; this model's plans were built for {built}"
        )
    check_decoder(recipe.decoder, facts)
    _check_frames(recipe, facts)
    if not 0 <= recipe.seed < 2**64:
        raise InvalidInput(
            "seed", recipe.seed, f"seed is {recipe.seed}; it must be from 0 to 2**64 - 1"
        )
    if not math.isfinite(recipe.guidance_scale):
        raise InvalidInput(
            "guidance_scale", recipe.guidance_scale, "guidance_scale must be a finite number"
        )
    if not model.family.SIZE_CONDITIONING:
        _check_no_size_told(recipe)
    prompts = (recipe.prompt, *(blend.prompt for blend in recipe.blends))
    texts = [("prompt", text) for text in prompts] + [("negative_prompt", recipe.negative_prompt)]
    for name, text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:  # what Python makes of other bytes on a command line
            message = f"{name} is {text!a:.80}, which is no Unicode text; write it in UTF-8"
            raise InvalidInput(name, text, message) from error
        if recipe.prompt_weighting:
            runs_of(text or "", name)
    shape = (recipe.height_px, recipe.width_px, 3)
    if recipe.image is not None and (recipe.image.shape != shape or recipe.image.dtype != np.uint8):
        found = f"{recipe.image.dtype} {recipe.image.shape}"
        raise InvalidInput("image", found, f"image is {found}; it must be uint8 {shape}")
    if recipe.mask is None:
        return
    if recipe.image is None:
        raise InvalidInput("mask", "given", "mask is given without an image; send the image too")
    if recipe.mask.shape != shape[:2] or recipe.mask.dtype != np.bool_:
        found = f"{recipe.mask.dtype} {recipe.mask.shape}"
        raise InvalidInput("mask", found, f"mask is {found}; it must be bool {shape[:2]}")


def _check_frames(recipe: Recipe, facts: Facts) -> None:
    """Raise `InvalidInput` for more frames than the model draws, and for a clip from an image."""
    count, most = recipe.num_frames, facts.max_num_frames
    if not 1 <= count <= most:
        allowed = (
            f"it must be from 1 to {most}"
            if facts.draws_clips
            else f"{facts.name} draws pictures, leave it out"
        )
        raise InvalidInput("num_frames", count, f"num_frames is {count}; {allowed}")
    if facts.draws_clips and recipe.image is not None:
        message = f"image is given; {facts.name} draws clips from text alone, leave it out"
        raise InvalidInput("image", "given", message)


def _check_no_size_told(recipe: Recipe) -> None:
    """Raise `InvalidInput` for what only a model with size conditioning could be told."""
    for name in ("original_size", "crops_coords_top_left", "target_size"):
        told = getattr(recipe, name)
        if told is not None:
            height, width = told
            value = f"{width}x{height}" if name.endswith("size") else list(told)
            message = f"{name} is {value}; this model has no size conditioning, leave it out"
            raise InvalidInput(name, told, message)
