"""AnimateDiff and AnimateLCM: Stable Diffusion whose UNet has motion modules; it draws clips.

As diffusers/pipelines/animatediff/pipeline_animatediff.py, from text alone. Latents have an axis of
frames; pictures are decoded frame by frame, as Stable Diffusion's are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engines.errors import CheckpointError
from engines.facts import MOTION_ADAPTER, Facts
from engines.families import stable_diffusion as sd
from engines.families.family import Conditions
from engines.families.part import Part
from engines.families.recipe import Recipe
from engines.families.step import denoiser_part, guided_step
from engines.families.vae import example_latents, vae_parts
from engines.samplers import Schedule, given_options

NAME = "animatediff"
PIPELINES = ("AnimateDiffPipeline",)
COMPONENTS = sd.COMPONENTS | {
    "unet": ("UNet2DConditionModel", "UNetMotionModel"),
    MOTION_ADAPTER: ("MotionAdapter",),
}
SIZE_CONDITIONING = False
TOKENWISE = sd.TOKENWISE
NUM_FRAMES, FRAMES_PER_SECOND = 16, 8  # what the motion modules were trained on
LCM_STEPS, LCM_GUIDANCE = 6, 1.5  # AnimateLCM's own
EXAMPLE_FRAMES = 3


class Denoiser(sd.Denoiser):
    """One whole step in one graph; its own inputs and outputs are those of `engines.families.step`,
    with latents float32 ``[B, C, F, h, w]``.

    Conditioning: ``prompt_embeds`` float32 ``[B, L, D]``, the same for all frames;
    ``timestep_cond`` float32 ``[B, K]`` for models with a guidance embedding.
    """

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, coefficients: Tensor, noise: Tensor,
        previous: Tensor, guidance: Tensor, uncond_index: Tensor, prompt_embeds: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        each = prompt_embeds[:, None].expand(-1, sample.shape[2], -1, -1)
        repeated = each.flatten(0, 1)  # [B F, L, D], the frames of a row side by side

        def predict(scaled: Tensor) -> Tensor:
            return self.predict(scaled, timestep, repeated, timestep_cond)

        return guided_step(predict, sample, coefficients, noise, previous, guidance, uncond_index)


def facts(name: str, pipeline: Any, scheduler: Mapping[str, Any]) -> Facts:
    """What serving must know of a loaded diffusers pipeline.

    Raises:
        CheckpointError: its UNet takes what this family's pipelines do not give.
    """
    unet = pipeline.unet.config
    if unet.in_channels != unet.out_channels:
        raise CheckpointError(
            f"{name} has a UNet with {unet.in_channels} input channels for "
            f"{unet.out_channels} of latents: clips are drawn from text alone, by a UNet that "
            "takes latents and no mask or picture"
        )
    limit = int(unet.motion_max_seq_length)
    found = sd.facts_of_unet(
        name,
        pipeline,
        family=NAME,
        windows=(
            sd.window_of(pipeline.tokenizer, pipeline.text_encoder, "tokenizer", "input_ids"),
        ),
        scheduler=given_options(pipeline.scheduler) | dict(scheduler),
        guidance_scale=8.5 if unet.time_cond_proj_dim else 7.5,
        default_num_frames=min(NUM_FRAMES, limit),
        max_num_frames=limit,
        frames_per_second=FRAMES_PER_SECOND,
    )
    if found.default_sampler != "lcm" or found.time_cond_dim:
        return found
    return dataclasses.replace(
        found, default_num_steps=LCM_STEPS, default_guidance_scale=LCM_GUIDANCE
    )


def conditions(facts: Facts, recipe: Recipe, schedule: Schedule) -> Conditions:
    """As Stable Diffusion's, with as many frames as are wanted."""
    found = sd.conditions(facts, recipe, schedule)
    channels, *sides = found.latents
    return dataclasses.replace(found, latents=(channels, recipe.num_frames, *sides))


def parts(pipeline: Any, known: Facts) -> list[Part]:
    """The graphs of a pipeline, the largest last; none encodes pictures."""
    frames = [example_latents(known) for _ in range(EXAMPLE_FRAMES)]
    width = pipeline.unet.config.cross_attention_dim
    conditioning = {"prompt_embeds": torch.randn(2, 2 * known.max_tokens, width)}
    conditioning |= sd.optional_conditioning(known)
    return [
        sd.text_part(sd.TextEncoder(pipeline.text_encoder), known, ("prompt_embeds",)),
        *vae_parts(pipeline, known),
        denoiser_part(
            Denoiser(pipeline.unet), known, torch.stack(frames, dim=2), conditioning, TOKENWISE
        ),
    ]
