"""PixArt-α, its consistency model PixArt-δ, and PixArt-Σ: a transformer denoises, T5 reads texts.

As diffusers/pipelines/pixart_alpha: pictures are drawn at the nearest of the sizes that the model
was trained on, and captions are lowered and stripped, as there without ``clean_caption``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engines.facts import Facts, Window
from engines.families import stable_diffusion as sd
from engines.families.family import Conditions, Lanewise
from engines.families.part import Part
from engines.families.recipe import Recipe
from engines.families.step import denoiser_part, guided_step
from engines.families.vae import CLASSES, example_latents, vae_parts
from engines.samplers import NoiseSchedule, Schedule, default_sampler, given_options

NAME = "pixart"
# Class → `max_sequence_length`, the tokens that its ``encode_prompt`` cuts a text to.
MAX_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
PIPELINES = tuple(MAX_TOKENS)
COMPONENTS = {  # of a pipeline → the classes that the parts below can be made of
    "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),  # the second of before 0.30
    "vae": CLASSES,
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
}
SIZE_CONDITIONING = False
TOKENWISE = ("prompt_embeds",)
FEW_STEPS, MANY_STEPS = 4, 20  # PixArt-δ's, and the pipelines' default
GUIDANCE_SCALE = 4.5  # the pipelines' default


class TextEncoder(torch.nn.Module):
    """``input_ids`` int64 ``[B, L]`` → ``prompt_embeds`` float32 ``[B, L, D]`` (last layer), and
    ``prompt_attention_mask`` int64 ``[B, L]``: 1 for the text and its end mark, 0 for padding.
    """

    def __init__(self, text_encoder: torch.nn.Module, eos_token_id: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.eos_token_id = eos_token_id

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        # By the last end mark, for a text may have both marks in it.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = ((input_ids == self.eos_token_id) * positions).amax(dim=1, keepdim=True)
        mask = (positions <= last).to(torch.int64)
        return self.text_encoder(input_ids, attention_mask=mask)[0].float(), mask


class PatchEmbed(torch.nn.Module):
    """Latents ``[B, C, h, w]`` → tokens ``[B, h/p · w/p, D]`` with their positions, of any size.

    diffusers' `PatchEmbed` keeps the positions of one size and makes those of others anew, which
    a traced graph cannot follow; here they are made of each size, in float32.
    """

    frequencies: Tensor  # float32 [D / 4]

    def __init__(self, built: Any) -> None:
        super().__init__()
        self.proj = built.proj
        self.extent = built.base_size / built.interpolation_scale  # of a side's positions
        quarter = built.proj.out_channels // 4
        powers = torch.arange(quarter, dtype=torch.float64) / quarter
        frequencies = (1.0 / 10000**powers).float()
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        patches = self.proj(latents)  # [B, D, h/p, w/p]
        rows, columns = (self._positions(side, patches.device) for side in patches.shape[2:])
        shape = (*patches.shape[2:], -1)
        both = [columns[None].expand(shape), rows[:, None].expand(shape)]  # columns come first
        tokens: Tensor = patches.permute(0, 2, 3, 1) + torch.cat(both, dim=-1)
        return tokens.flatten(1, 2).to(latents.dtype)

    def _positions(self, side: int, device: torch.device) -> Tensor:
        """float32 ``[side, D / 2]``, see `get_2d_sincos_pos_embed` of diffusers."""
        positions = torch.arange(side, dtype=torch.float32, device=device) * (self.extent / side)
        angles = positions[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class _OneMoreDimension(torch.nn.Linear):
    """`PixArtTransformer2DModel.forward` squeezes its tokens' dimension, which does nothing but
    where there is one alone; ONNX's operator knows no such case. So it takes away what this adds.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).unsqueeze(1)


class Denoiser(torch.nn.Module):
    """One whole step in one graph; its own inputs and outputs are those of `engines.families.step`.

    Conditioning: ``prompt_embeds`` float32 ``[B, L, D]`` and ``prompt_attention_mask`` int64
    ``[B, L]``; ``resolution`` float32 ``[B, 2]``, height and width in pixels, and ``aspect_ratio``
    float32 ``[B, 1]`` for models that are told them.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        transformer.pos_embed = PatchEmbed(transformer.pos_embed)
        transformer.proj_out.__class__ = _OneMoreDimension

    def forward(
        self, sample: Tensor, timestep: Tensor, coefficients: Tensor, noise: Tensor,
        previous: Tensor, guidance: Tensor, uncond_index: Tensor, prompt_embeds: Tensor,
        prompt_attention_mask: Tensor, resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype = self.transformer.dtype

        def predict(scaled: Tensor) -> Tensor:
            output: Tensor = self.transformer(
                scaled.to(dtype),
                encoder_hidden_states=prompt_embeds.to(dtype),
                encoder_attention_mask=prompt_attention_mask,
                timestep=timestep,
                added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
                return_dict=False,
            )[0]
            return output[:, : scaled.shape[1]]  # what may be beside it is a learned variance

        return guided_step(predict, sample, coefficients, noise, previous, guidance, uncond_index)


def facts(name: str, pipeline: Any, scheduler: Mapping[str, Any]) -> Facts:
    """What serving must know of a loaded diffusers pipeline.

    A checkpoint is taken for one of few steps, without guidance, where its scheduler is LCM's or
    TCD's.
    """
    config = pipeline.transformer.config
    scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    multiple = scale * config.patch_size
    default = config.sample_size * scale
    kind, tokenizer = type(pipeline).__name__, pipeline.tokenizer
    options = given_options(pipeline.scheduler) | dict(scheduler)
    sampler, _ = default_sampler(NoiseSchedule.from_config(options))
    few = sampler in ("lcm", "tcd")
    window = Window(
        input="input_ids",
        tokenizer="tokenizer",
        max_tokens=MAX_TOKENS[kind],
        pad_token_id=int(tokenizer.pad_token_id),
        eos_token_id=int(tokenizer.eos_token_id),
        lowered=True,
    )
    return Facts(
        name=name,
        family=NAME,
        latent_channels=int(config.in_channels),
        vae_scale_factor=scale,
        default_size_px=default,
        size_multiple_px=multiple,
        min_size_px=max(multiple, default // 2 // multiple * multiple),
        max_size_px=default * 2,
        windows=(window,),
        time_cond_dim=0,
        default_sampler=sampler,
        default_num_steps=FEW_STEPS if few else MANY_STEPS,
        default_guidance_scale=1.0 if few else GUIDANCE_SCALE,
        scheduler=options,
        told_size=bool(pipeline.transformer.use_additional_conditions),
        aspect_bins=_aspect_bins(kind, config.sample_size),
    )


def _aspect_bins(kind: str, sample_size: int) -> dict[str, tuple[int, int]]:
    """Height and width by the ratio of one to the other, for the side that a model has as its own.

    None for sides of which diffusers knows no bins.
    """
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma

    known = {
        32: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
        64: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
        128: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
    }
    if kind == "PixArtSigmaPipeline":
        known[256] = pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN
    found = known.get(sample_size, {})
    return {ratio: (int(height), int(width)) for ratio, (height, width) in found.items()}


def conditions(facts: Facts, recipe: Recipe, schedule: Schedule) -> Conditions:
    """As Stable Diffusion's, at the size that is drawn, which some models are told."""
    width, height = facts.drawn_size(recipe.width_px, recipe.height_px, recipe.image is not None)
    found = sd.conditions(
        facts, dataclasses.replace(recipe, width_px=width, height_px=height), schedule
    )
    if not facts.told_size:
        return found
    tensors: dict[str, Lanewise] = {
        "resolution": (torch.tensor([height, width], dtype=torch.float32),),
        "aspect_ratio": (torch.tensor([height / width], dtype=torch.float32),),
    }
    return dataclasses.replace(found, tensors=tensors)


def parts(pipeline: Any, known: Facts) -> list[Part]:
    """The four graphs of a pipeline."""
    transformer, encoder = pipeline.transformer, pipeline.text_encoder
    patch = known.size_multiple_px // known.vae_scale_factor
    latents = example_latents(known).repeat(1, 1, patch, patch)  # an odd number of patches
    (window,) = known.windows
    conditioning = {
        "prompt_embeds": torch.randn(2, window.max_tokens, encoder.config.d_model),
        "prompt_attention_mask": torch.ones(2, window.max_tokens, dtype=torch.int64),
    }
    if known.told_size:
        side = float(known.default_size_px)
        conditioning |= {
            "resolution": torch.full((2, 2), side),
            "aspect_ratio": torch.ones(2, 1),
        }
    outputs = ("prompt_embeds", "prompt_attention_mask")
    return [
        sd.text_part(TextEncoder(encoder, window.eos_token_id), known, outputs),
        *vae_parts(pipeline, known),
        denoiser_part(Denoiser(transformer), known, latents, conditioning),
    ]
