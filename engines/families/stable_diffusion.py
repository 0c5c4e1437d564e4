"""Stable Diffusion 1.x and 2.x, with and without the LCM guidance embedding.

Latents, noise, embeddings and coefficients cross every boundary in float32 and the sampler's
arithmetic stays float32; only the networks inside run in the chosen precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engines.errors import CheckpointError
from engines.facts import MAX_CHUNKS, Facts, Window
from engines.families import vae
from engines.families.family import Conditions, Lanewise
from engines.families.guidance import guidance_embedding
from engines.families.part import Part
from engines.families.recipe import Recipe
from engines.families.step import BATCH, denoiser_part, guided_step
from engines.families.vae import example_latents, vae_parts
from engines.samplers import NoiseSchedule, Schedule, default_sampler, given_options

NAME = "stable_diffusion"
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)
SIZE_CONDITIONING = False
TOKENWISE = ("prompt_embeds",)
# What StableDiffusionPipeline does to any scheduler that it is given.
SET_BY_PIPELINE = {"steps_offset": 1, "clip_sample": False}
COMPONENTS = {  # of a pipeline → the classes that the parts below can be made of
    "unet": ("UNet2DConditionModel",),
    "vae": vae.CLASSES,
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}  # fmt: skip


class TextEncoder(torch.nn.Module):
    """``input_ids`` int64 ``[B, L]`` → ``prompt_embeds`` float32 ``[B, L, D]`` (last layer)."""

    def __init__(self, text_encoder: torch.nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_encoder(input_ids, return_dict=False)[0].float()  # type: ignore[no-any-return]


class Denoiser(torch.nn.Module):
    """One whole step in one graph; its own inputs and outputs are those of `engines.families.step`.

    Conditioning: ``prompt_embeds`` float32 ``[B, L, D]``; ``timestep_cond`` float32 ``[B, K]`` for
    models with a guidance embedding; ``mask`` float32 ``[B, 1, h, w]`` and ``masked_latents``
    float32 ``[B, C, h, w]`` for those that take a mask, whose UNet sees them beside the latents.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        # UNet2DConditionModel hands the up path its sizes only where a side is no multiple of
        # 2 ** num_upsamplers. No side is one of 2 ** 30: one graph for every size, odd ones too.
        unet.num_upsamplers = 30

    def forward(
        self, sample: Tensor, timestep: Tensor, coefficients: Tensor, noise: Tensor,
        previous: Tensor, guidance: Tensor, uncond_index: Tensor, prompt_embeds: Tensor,
        timestep_cond: Tensor | None = None, mask: Tensor | None = None,
        masked_latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        def predict(scaled: Tensor) -> Tensor:
            seen = beside(scaled, mask, masked_latents)
            return self.predict(seen, timestep, prompt_embeds, timestep_cond)

        return guided_step(predict, sample, coefficients, noise, previous, guidance, uncond_index)

    def predict(
        self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor,
        timestep_cond: Tensor | None, **more: Any,
    ) -> Tensor:  # fmt: skip
        """What the UNet itself says, in its own type."""
        dtype = self.unet.dtype
        output: Tensor = self.unet(
            sample.to(dtype),
            timestep,
            prompt_embeds.to(dtype),
            timestep_cond=None if timestep_cond is None else timestep_cond.to(dtype),
            return_dict=False,
            **more,
        )[0]
        return output


def beside(latents: Tensor, mask: Tensor | None, masked_latents: Tensor | None) -> Tensor:
    """What the UNet sees: the latents, scaled already, and what a mask leaves, where it takes one.

    The order is that of diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion_inpaint.py.
    """
    if mask is None or masked_latents is None:
        return latents
    return torch.cat([latents, mask, masked_latents], dim=1)


def takes_mask(unet: Any) -> bool:
    """Whether a UNet of this config sees latents, a mask and masked latents: 9 channels for 4."""
    return bool(unet.in_channels == 2 * unet.out_channels + 1)


def _latent_side(sample_size: Any) -> int:
    """Of the pictures that a UNet was trained on, as its ``sample_size`` says."""
    sides = sample_size if isinstance(sample_size, list | tuple) else [sample_size]
    if not sides or any(type(side) is not int or side < 1 or side != sides[0] for side in sides):
        raise CheckpointError(
            f"unet/config.json has the sample_size {sample_size!r}; write one whole number there, "
            "the side in latents that it was trained on (64 for 512 px)"
        )
    return int(sides[0])


def facts(name: str, pipeline: Any, scheduler: Mapping[str, Any]) -> Facts:
    """What serving must know of a loaded diffusers pipeline."""
    embedding = bool(pipeline.unet.config.time_cond_proj_dim)
    inpainting = takes_mask(pipeline.unet.config)  # by a pipeline that is not LCM's own
    set_by_pipeline = {} if embedding else SET_BY_PIPELINE
    return facts_of_unet(
        name,
        pipeline,
        family=NAME,
        windows=(window_of(pipeline.tokenizer, pipeline.text_encoder, "tokenizer", "input_ids"),),
        scheduler=given_options(pipeline.scheduler) | set_by_pipeline | dict(scheduler),
        guidance_scale=8.5 if embedding else 7.5,
        strength_drops_steps=inpainting or not embedding,
    )


def facts_of_unet(
    name: str,
    pipeline: Any,
    *,
    scheduler: Mapping[str, Any],
    guidance_scale: float,
    **own: Any,
) -> Facts:
    """What UNet, VAE and scheduler say, and the family's ``own``.

    A checkpoint is taken for one of few steps, without guidance, where its scheduler is LCM's or
    TCD's, or spaces its steps backwards from the last, as Turbo's and Lightning's do; but for those
    trained to zero SNR, whose many steps are spaced so as well.
    """
    unet, autoencoder = pipeline.unet.config, pipeline.vae.config
    scale = 2 ** (len(autoencoder.block_out_channels) - 1)
    smallest = scale * 2 ** (len(unet.block_out_channels) - 1)  # one latent at the lowest level
    default = _latent_side(unet.sample_size) * scale
    embedding = int(unet.time_cond_proj_dim or 0)
    sampler, _ = default_sampler(NoiseSchedule.from_config(scheduler))
    trailing = scheduler.get("timestep_spacing") == "trailing"
    zero_snr = scheduler.get("rescale_betas_zero_snr", False)
    few = sampler in ("lcm", "tcd") or (trailing and not zero_snr)
    return Facts(
        name=name,
        latent_channels=int(unet.out_channels),
        vae_scale_factor=scale,
        default_size_px=default,
        size_multiple_px=scale,
        min_size_px=max(smallest, default // 2 // scale * scale),
        max_size_px=default * 2,
        time_cond_dim=embedding,
        default_sampler=sampler,
        default_num_steps=4 if few else 25,
        default_guidance_scale=1.0 if few and not embedding else guidance_scale,
        scheduler=scheduler,
        takes_mask=takes_mask(unet),
        max_chunks=MAX_CHUNKS,
        **own,
    )


def window_of(tokenizer: Any, encoder: Any, name: str, part_input: str) -> Window:
    """What an encoder reads of a text that its tokenizer has cut."""
    return Window(
        input=part_input,
        tokenizer=name,
        max_tokens=int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings)),
        pad_token_id=int(tokenizer.pad_token_id),
        eos_token_id=int(tokenizer.eos_token_id),
    )


def conditions(facts: Facts, recipe: Recipe, schedule: Schedule) -> Conditions:
    """A second lane for guidance above 1, or the weight itself where the model takes it."""
    guided = not facts.time_cond_dim and recipe.guidance_scale > 1
    tensors: dict[str, Lanewise] = {}
    if facts.time_cond_dim:
        embedding = guidance_embedding(recipe.guidance_scale - 1.0, facts.time_cond_dim)
        tensors["timestep_cond"] = (embedding,)
    scale = facts.vae_scale_factor
    return Conditions(
        texts=(recipe.prompt, recipe.negative_prompt or "") if guided else (recipe.prompt,),
        latents=(facts.latent_channels, recipe.height_px // scale, recipe.width_px // scale),
        tensors=tensors,
    )


def parts(pipeline: Any, known: Facts) -> list[Part]:
    """The graphs of a pipeline, the largest last."""
    width = pipeline.unet.config.cross_attention_dim
    conditioning = {"prompt_embeds": torch.randn(2, 2 * known.max_tokens, width)}
    conditioning |= optional_conditioning(known)
    return [
        text_part(TextEncoder(pipeline.text_encoder), known, ("prompt_embeds",)),
        *vae_parts(pipeline, known),
        denoiser_part(
            Denoiser(pipeline.unet), known, example_latents(known), conditioning, TOKENWISE
        ),
    ]


def optional_conditioning(known: Facts) -> dict[str, Tensor]:
    """Examples, of two rows, of what only some UNets take."""
    found = {}
    if known.time_cond_dim:
        found["timestep_cond"] = torch.randn(2, known.time_cond_dim)
    if known.takes_mask:
        latents = example_latents(known)
        found |= {"mask": torch.ones_like(latents[:, :1]), "masked_latents": latents}
    return found


def text_part(module: torch.nn.Module, known: Facts, outputs: tuple[str, ...]) -> Part:
    """The part ``text_encoder``, which takes the ids of each window and gives conditioning."""
    example = {
        window.input: torch.full((2, window.max_tokens), window.pad_token_id, dtype=torch.int64)
        for window in known.windows
    }
    return Part("text_encoder", module, example, dict.fromkeys(example, (BATCH, None)), outputs)
