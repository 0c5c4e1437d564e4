"""The autoencoders of families whose latents are pictures 8 times smaller: both ways, as parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.facts import TINY_VAE, Facts
from engines.families.part import Part
from engines.families.step import BATCH, LATENTS, Dims

TINY = "AutoencoderTiny"
CLASSES = ("AutoencoderKL", TINY)


class Normalized(torch.nn.Module):
    """A VAE with what its latents are shifted and scaled by: the denoiser's have unit variance.

    Where the config gives a mean and a standard deviation of each channel, by these
    (``StableDiffusionXLImg2ImgPipeline.prepare_latents``); else the scale is one for all.
    """

    scale: Tensor  # float32 [1, C, 1, 1]
    shift: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is None or std is None:
            mean, std = [0.0], [1.0]
        scale = vae.config.scaling_factor / torch.tensor(std)
        self.register_buffer("scale", scale.reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)


class VaeDecoder(Normalized):
    """``latents`` float32 ``[B, C, h, w]`` → ``pixels`` uint8 ``[B, H, W, 3]``, ``pixel_sums``,
    ``image`` float32 ``[B, H, W, 3]``.

    ``image`` is what the pixels are before they are clamped and rounded, mostly from -1 to 1: tiles
    are blended so. ``pixel_sums`` float32 ``[B]`` are its sums: finite where all values are. A
    decoder that overflows would else answer with a black picture.
    """

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = latents / self.scale + self.shift
        image = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].float()
        sums = image.sum(dim=(1, 2, 3))  # [B]
        image = image.permute(0, 2, 3, 1)
        return to_bytes(image), sums, image


def to_bytes(image: Tensor) -> Tensor:
    """Values from -1 to 1 as uint8, as diffusers' image processor rounds them."""
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


class VaeEncoder(Normalized):
    """``pixels`` uint8 ``[B, H, W, 3]`` → ``mean, std`` float32 ``[B, C, h, w]``, scaled.

    ``kept`` float32 ``[B, H, W]``, of models that take a mask: 0 where pixels count as mid-grey,
    else 1.
    """

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        moments = self.vae.encoder(_input_of(self.vae, pixels, kept))
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        mean, logvar = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))  # DiagonalGaussianDistribution
        return (mean - self.shift) * self.scale, std * self.scale


class TinyVaeEncoder(Normalized):
    """``pixels`` uint8 ``[B, H, W, 3]`` → ``mean`` float32 ``[B, C, h, w]``, scaled.

    ``kept`` as `VaeEncoder` has it. An `AutoencoderTiny` answers with latents, not with a
    distribution to sample them from.
    """

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        image = _input_of(self.vae, pixels, kept)
        latents = self.vae.encode(image, return_dict=False)[0].float()
        return (latents - self.shift) * self.scale  # type: ignore[no-any-return]


def _input_of(vae: Any, pixels: Tensor, kept: Tensor | None) -> Tensor:
    """uint8 ``[B, H, W, 3]`` as a VAE takes it: ``[B, 3, H, W]`` from -1 to 1, in its own type."""
    image = pixels.float().permute(0, 3, 1, 2) / 127.5 - 1.0  # TensorRT moves no uint8
    if kept is not None:
        image = image * kept[:, None]  # no byte is mid-grey
    return image.to(vae.dtype)


def example_latents(known: Facts) -> Tensor:
    """Two rows ``[2, C, h, w]``, of an odd size so that no graph comes to rest on even ones.

    At least 9 a side, which an export may count on.
    """
    side = max(8, known.default_size_px // known.vae_scale_factor // 2) + 1
    return torch.randn(2, known.latent_channels, side, side)


def vae_parts(pipeline: Any, known: Facts) -> list[Part]:
    """The parts ``vae_decoder`` and, but for models that draw clips, from text alone,
    ``vae_encoder``; ``tiny_vae_decoder`` and ``tiny_vae_encoder`` likewise where the pipeline has a
    ``tiny_vae`` beside its own.
    """
    vaes = {"": pipeline.vae}
    if TINY_VAE in known.components:
        vaes["tiny_"] = pipeline.tiny_vae
    parts = [_decoder_part(f"{name}vae_decoder", vae, known) for name, vae in vaes.items()]
    if not known.draws_clips:
        parts += [_encoder_part(f"{name}vae_encoder", vae, known) for name, vae in vaes.items()]
    return parts


def _encoder_part(name: str, vae: Any, known: Facts) -> Part:
    scale = known.vae_scale_factor
    rows, columns = (scale * side for side in example_latents(known).shape[2:])
    sides = (BATCH, ("rows", scale), ("columns", scale))
    example = {"pixels": torch.zeros(2, rows, columns, 3, dtype=torch.uint8)}
    dynamic: dict[str, Dims] = {"pixels": (*sides, None)}
    if known.takes_mask:
        example["kept"], dynamic["kept"] = torch.ones(2, rows, columns), sides
    tiny = type(vae).__name__ == TINY
    encoder = TinyVaeEncoder(vae) if tiny else VaeEncoder(vae)
    outputs = ("mean",) if tiny else ("mean", "std")
    return Part(name, encoder, example, dynamic, outputs)


def _decoder_part(name: str, vae: Any, known: Facts) -> Part:
    example, dynamic = {"latents": example_latents(known)}, {"latents": LATENTS}
    return Part(name, VaeDecoder(vae), example, dynamic, ("pixels", "pixel_sums", "image"))
