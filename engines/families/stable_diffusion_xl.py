"""Stable Diffusion XL, its prunings (SSD-1B) and few-step kin, without the refiner.

Two text encoders, a pooled embedding and the picture's sizes condition the UNet
(diffusers/pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engines.facts import Facts
from engines.families import stable_diffusion as sd
from engines.families.family import Conditions
from engines.families.part import Part
from engines.families.recipe import Recipe
from engines.families.step import denoiser_part, guided_step
from engines.families.vae import CLASSES, example_latents, vae_parts
from engines.samplers import Schedule, given_options

NAME = "stable_diffusion_xl"
PIPELINES = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
COMPONENTS = {  # of a pipeline → the classes that the parts below can be made of
    "unet": ("UNet2DConditionModel",),
    "vae": CLASSES,
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
SIZE_CONDITIONING = True
TOKENWISE = ("prompt_embeds",)
NUM_TIME_IDS = 6  # original height and width, crop's top and left, target height and width


class TextEncoders(torch.nn.Module):
    """``input_ids, input_ids_2`` int64 ``[B, L]``, by a tokenizer each → ``prompt_embeds`` float32
    ``[B, L, D]``, both encoders' last layer but one side by side, and ``pooled_embeds`` float32
    ``[B, E]``, the second's projection.
    """

    def __init__(self, text_encoder: torch.nn.Module, text_encoder_2: torch.nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        embeds = [encoded.hidden_states[-2] for encoded in (first, second)]
        return torch.cat(embeds, dim=-1).float(), second.text_embeds.float()


class Denoiser(sd.Denoiser):
    """One whole step in one graph; its own inputs and outputs are those of `engines.families.step`.

    Conditioning: ``prompt_embeds`` float32 ``[B, L, D]``; ``pooled_embeds`` float32 ``[B, E]``;
    ``time_ids`` float32 ``[B, 6]``, sizes in pixels; ``timestep_cond`` float32 ``[B, K]`` for
    models with a guidance embedding; ``mask``, ``masked_latents`` as Stable Diffusion's.
    """

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, coefficients: Tensor, noise: Tensor,
        previous: Tensor, guidance: Tensor, uncond_index: Tensor, prompt_embeds: Tensor,
        pooled_embeds: Tensor, time_ids: Tensor, timestep_cond: Tensor | None = None,
        mask: Tensor | None = None, masked_latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # Sizes are embedded in float32 and joined with what is pooled: no mixed types in the graph.
        added = {"text_embeds": pooled_embeds, "time_ids": time_ids}

        def predict(scaled: Tensor) -> Tensor:
            seen = sd.beside(scaled, mask, masked_latents)
            return self.predict(
                seen, timestep, prompt_embeds, timestep_cond, added_cond_kwargs=added
            )

        return guided_step(predict, sample, coefficients, noise, previous, guidance, uncond_index)


def facts(name: str, pipeline: Any, scheduler: Mapping[str, Any]) -> Facts:
    """What serving must know of a loaded diffusers pipeline."""
    windows = (
        sd.window_of(pipeline.tokenizer, pipeline.text_encoder, "tokenizer", "input_ids"),
        sd.window_of(pipeline.tokenizer_2, pipeline.text_encoder_2, "tokenizer_2", "input_ids_2"),
    )
    last = pipeline.text_encoder.config.num_hidden_layers - 1  # what it says is not read
    return sd.facts_of_unet(
        name,
        pipeline,
        family=NAME,
        windows=windows,
        scheduler=given_options(pipeline.scheduler) | dict(scheduler),
        guidance_scale=5.0,
        zeros_for_no_negative=bool(pipeline.config.force_zeros_for_empty_prompt),
        idle_weights=(f"text_encoder.encoder.layers.{last}.",),
    )


def conditions(facts: Facts, recipe: Recipe, schedule: Schedule) -> Conditions:
    """As Stable Diffusion's, and the sizes that the picture is said to have."""
    found = sd.conditions(facts, recipe, schedule)
    if len(found.texts) == 2 and recipe.negative_prompt is None and facts.zeros_for_no_negative:
        found = dataclasses.replace(found, texts=(recipe.prompt, None))
    drawn = (recipe.height_px, recipe.width_px)
    sizes = (
        *(recipe.original_size or drawn),
        *(recipe.crops_coords_top_left or (0, 0)),
        *(recipe.target_size or drawn),
    )
    time_ids = torch.tensor(sizes, dtype=torch.float32)
    return dataclasses.replace(found, tensors={"time_ids": (time_ids,), **found.tensors})


def parts(pipeline: Any, known: Facts) -> list[Part]:
    """The graphs of a pipeline, the largest last."""
    unet, vae, encoder_2 = pipeline.unet, pipeline.vae, pipeline.text_encoder_2
    if vae.config.force_upcast and vae.dtype == torch.float16:  # as diffusers decodes and encodes
        vae.to(torch.float32)
    width = unet.config.cross_attention_dim
    conditioning = {
        "prompt_embeds": torch.randn(2, 2 * known.max_tokens, width),
        "pooled_embeds": torch.randn(2, encoder_2.config.projection_dim),
        "time_ids": torch.full((2, NUM_TIME_IDS), float(known.default_size_px)),
    }
    conditioning |= sd.optional_conditioning(known)
    encoders = TextEncoders(pipeline.text_encoder, encoder_2)
    return [
        sd.text_part(encoders, known, ("prompt_embeds", "pooled_embeds")),
        *vae_parts(pipeline, known),
        denoiser_part(Denoiser(unet), known, example_latents(known), conditioning, TOKENWISE),
    ]
