"""Stable Diffusion 1.x and 2.x, with and without the LCM guidance embedding.

Latents, noise, embeddings and coefficients cross every boundary in float32 and the sampler's
arithmetic stays float32; only the networks inside run in the chosen precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.errors import CheckpointError
from engines.facts import Facts, Window
from engines.families.family import Conditions, Lanewise
from engines.families.guidance import guidance_embedding
from engines.families.part import Part
from engines.families.recipe import Recipe
from engines.samplers import NoiseSchedule, Schedule, default_sampler, given_options

NAME = "stable_diffusion"
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
# What StableDiffusionPipeline does to any scheduler that it is given.
SET_BY_PIPELINE = {"steps_offset": 1, "clip_sample": False}
COMPONENTS = {  # of a pipeline → the classes that the parts below can be made of
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
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
    """One whole step: input scaling, UNet, guidance, sampler and re-noising in one graph.

    ``sample, noise, previous`` float32 ``[B, C, h, w]``, the last of them what the step before
    gave as ``denoised``; ``timestep, guidance`` float32 ``[B]``; ``coefficients`` float32
    ``[B, 7]`` (see `engines.samplers`); ``uncond_index`` int64 ``[B]``: for each row the row that
    holds its unconditional prediction, itself where there is none (then guidance must be 1).
    Conditioning: ``prompt_embeds`` float32 ``[B, L, D]``; ``timestep_cond`` float32 ``[B, K]`` for
    models with a guidance embedding. Returns ``next_sample, denoised`` float32 ``[B, C, h, w]``.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        # UNet2DConditionModel hands the up path its sizes only where a side is no multiple of
        # 2 ** num_upsamplers. No side is one of 2 ** 30: one graph for every size, odd ones too.
        unet.num_upsamplers = 30

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        coefficients: Tensor,
        noise: Tensor,
        previous: Tensor,
        guidance: Tensor,
        uncond_index: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        dtype = self.unet.dtype
        i, a, b, p, q, r, s = (c[:, None, None, None] for c in coefficients.unbind(1))  # [B,1,1,1]
        noise_pred = self.unet(
            (i * sample).to(dtype),
            timestep,
            prompt_embeds.to(dtype),
            timestep_cond=None if timestep_cond is None else timestep_cond.to(dtype),
            return_dict=False,
        )[0].float()
        uncond = noise_pred.index_select(0, uncond_index)
        noise_pred = uncond + guidance[:, None, None, None] * (noise_pred - uncond)
        next_sample = p * sample + q * noise_pred + r * noise + s * previous
        return next_sample, a * sample + b * noise_pred


class VaeDecoder(torch.nn.Module):
    """``latents`` float32 ``[B, C, h, w]`` → ``pixels`` uint8 ``[B, H, W, 3]``, ``pixel_sums``.

    ``pixel_sums`` float32 ``[B]`` are those of the decoded images before they are clamped: finite
    where all values are. A decoder that overflows would else answer with a black picture.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        scaled = latents / self.vae.config.scaling_factor
        image = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].float()
        sums = image.sum(dim=(1, 2, 3))  # [B]
        image = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (image * 255).round().to(torch.uint8), sums


class VaeEncoder(torch.nn.Module):
    """``pixels`` uint8 ``[B, H, W, 3]`` → ``mean, std`` float32 ``[B, C, h, w]``, scaled."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.vae.encoder(_input_of(self.vae, pixels))
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        mean, logvar = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))  # DiagonalGaussianDistribution
        scale = self.vae.config.scaling_factor
        return mean * scale, std * scale


class TinyVaeEncoder(torch.nn.Module):
    """``pixels`` uint8 ``[B, H, W, 3]`` → ``mean`` float32 ``[B, C, h, w]``, scaled.

    An `AutoencoderTiny` answers with latents, not with a distribution to sample them from.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode(_input_of(self.vae, pixels), return_dict=False)[0].float()
        return latents * self.vae.config.scaling_factor  # type: ignore[no-any-return]


def _input_of(vae: Any, pixels: Tensor) -> Tensor:
    """uint8 ``[B, H, W, 3]`` as a VAE takes it: ``[B, 3, H, W]`` from -1 to 1, in its own type."""
    image = pixels.float().permute(0, 3, 1, 2) / 127.5 - 1.0  # TensorRT moves no uint8
    return image.to(vae.dtype)


def _latent_side(sample_size: Any) -> int:
    """Of the pictures that a UNet was trained on, as its ``sample_size`` says."""
    sides = sample_size if isinstance(sample_size, list | tuple) else [sample_size]
    if not sides or any(type(side) is not int or side < 1 or side != sides[0] for side in sides):
        raise CheckpointError(
            f"unet/config.json has the sample_size {sample_size!r}; write one whole number there, "
            "the side in latents that it was trained on (64 for 512 px)"
        )
    return int(sides[0])


def facts(name: str, pipeline: Any) -> Facts:
    """What serving must know of a loaded diffusers pipeline."""
    unet, vae, tokenizer = pipeline.unet.config, pipeline.vae.config, pipeline.tokenizer
    scale = 2 ** (len(vae.block_out_channels) - 1)
    smallest = scale * 2 ** (len(unet.block_out_channels) - 1)  # one latent at the lowest level
    default = _latent_side(unet.sample_size) * scale
    embedding = int(unet.time_cond_proj_dim or 0)
    scheduler = given_options(pipeline.scheduler) | ({} if embedding else SET_BY_PIPELINE)
    sampler, _ = default_sampler(NoiseSchedule.from_config(scheduler))
    few = sampler in ("lcm", "tcd")
    window = min(tokenizer.model_max_length, pipeline.text_encoder.config.max_position_embeddings)
    return Facts(
        name=name,
        family=NAME,
        latent_channels=int(unet.in_channels),
        vae_scale_factor=scale,
        default_size_px=default,
        size_multiple_px=scale,
        min_size_px=max(smallest, default // 2 // scale * scale),
        max_size_px=default * 2,
        windows=(
            Window(
                input="input_ids",
                tokenizer="tokenizer",
                max_tokens=int(window),
                pad_token_id=int(tokenizer.pad_token_id),
                eos_token_id=int(tokenizer.eos_token_id),
            ),
        ),
        time_cond_dim=embedding,
        default_sampler=sampler,
        default_num_steps=4 if few else 25,
        default_guidance_scale=8.5 if embedding else 1.0 if few else 7.5,
        scheduler=scheduler,
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
        texts=(recipe.prompt, recipe.negative_prompt) if guided else (recipe.prompt,),
        latents=(facts.latent_channels, recipe.height_px // scale, recipe.width_px // scale),
        tensors=tensors,
    )


def parts(pipeline: Any, known: Facts) -> list[Part]:
    """The four graphs of a pipeline, smallest first."""
    unet, channels = pipeline.unet, known.latent_channels
    side = known.default_size_px // known.vae_scale_factor // 2 + 1
    width = int(unet.config.cross_attention_dim)
    batch = ("batch", 1)
    latent_dims = [batch, None, ("rows", 1), ("columns", 1)]
    scale = known.vae_scale_factor
    pixel_dims = [batch, ("rows", scale), ("columns", scale), None]
    latents = torch.randn(2, channels, side, side)
    pixels = torch.zeros(2, side * scale, side * scale, 3)
    denoiser = {
        "sample": latents,
        "timestep": torch.tensor([999.0, 499.0]),
        "prompt_embeds": torch.randn(2, known.max_tokens, width),
        "coefficients": torch.rand(2, known.num_coefficients),
        "noise": torch.randn_like(latents),
        "previous": torch.randn_like(latents),
        "guidance": torch.ones(2),
        "uncond_index": torch.arange(2),
    }
    dims: dict[str, list[tuple[str, int] | None]] = {
        "sample": latent_dims,
        "timestep": [batch],
        "prompt_embeds": [batch, None, None],
        "coefficients": [batch, None],
        "noise": latent_dims,
        "previous": latent_dims,
        "guidance": [batch],
        "uncond_index": [batch],
    }
    if known.time_cond_dim:
        denoiser["timestep_cond"] = torch.randn(2, known.time_cond_dim)
        dims["timestep_cond"] = [batch, None]
    tiny = type(pipeline.vae).__name__ == "AutoencoderTiny"
    encoder = TinyVaeEncoder(pipeline.vae) if tiny else VaeEncoder(pipeline.vae)
    (window,) = known.windows
    ids = torch.full((2, window.max_tokens), window.pad_token_id, dtype=torch.int64)
    return [
        Part("text_encoder", TextEncoder(pipeline.text_encoder), {"input_ids": ids},
             {"input_ids": [batch, None]}, ("prompt_embeds",)),
        Part("vae_decoder", VaeDecoder(pipeline.vae), {"latents": latents},
             {"latents": latent_dims}, ("pixels", "pixel_sums")),
        Part("vae_encoder", encoder, {"pixels": pixels.to(torch.uint8)},
             {"pixels": pixel_dims}, ("mean",) if tiny else ("mean", "std")),
        Part("denoiser", Denoiser(unet), denoiser, dims, ("next_sample", "denoised")),
    ]  # fmt: skip
