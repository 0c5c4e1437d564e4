"""Stages 1 and 6: the autoencoder, and then its decoder alone.

The first learns latents 8 times smaller than the picture, on crops, until they are good enough to
train on. The second leaves those latents as they are and sharpens what is drawn from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.distill.networks import SIZE_PX, VAE_SCALE_FACTOR, build_vae
from engines.distill.samples import Samples, make_samples, to_pixels
from engines.distill.training import Course, Draws, Place, train
from engines.distill.world import LOOKS

COURSE = Course(num_steps=6_000, batch_size=16, learning_rate=1.5e-3, average=0.995)
DECODER_COURSE = Course(num_steps=2_500, batch_size=6, learning_rate=1e-3, average=0.995)
CROP_PX = 64  # a step costs a quarter of a whole picture's and sees as many edges
LATENT_NOISE = 0.1  # in standard deviations: a denoiser's latents are never quite an encoder's
KL_WEIGHT = 1e-5
STYLED_EVERY = 4  # one crop in so many is of a style: what LoRAs draw, the VAE must decode
NUM_PLAIN, NUM_STYLED = 24_000, 2_000


def train_vae(course: Course, place: Place, tokenizer: Any) -> Any:
    """Train and return the AutoencoderKL, its ``scaling_factor`` measured and set.

    The loss is the mean absolute plus mean squared error of the pixels and a little KL divergence
    from the standard normal, as of Stable Diffusion's autoencoder without its discriminator.
    """
    torch.manual_seed(place.seed)
    vae = build_vae().to(place.device)
    native = (SIZE_PX, SIZE_PX)
    plain = make_samples(place, tokenizer, native, NUM_PLAIN)
    styled = [make_samples(place, tokenizer, native, NUM_STYLED, style) for style in LOOKS]

    def loss_of(draws: Draws) -> Tensor:
        sources = [
            styled[index // STYLED_EVERY % 2] if index % STYLED_EVERY == 0 else plain
            for index in range(course.batch_size)
        ]
        pixels = _crops(sources, draws.numpy).to(place.device)  # [B, 3, 64, 64]
        with place.autocast():
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=draws.torch)
            drawn = vae.decode(posterior.mean + posterior.std * noise.to(place.device)).sample
        drawn, mean, logvar = drawn.float(), posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        distance: Tensor = F.l1_loss(drawn, pixels) + F.mse_loss(drawn, pixels)
        loss: Tensor = distance + KL_WEIGHT * divergence
        return loss

    train("vae", course, place, list(vae.parameters()), loss_of)
    vae.eval().requires_grad_(False)
    latents = encode(vae, plain.images[:1024], place)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae


@torch.no_grad()
def encode(vae: Any, images: np.ndarray[Any, np.dtype[np.uint8]], place: Place) -> Tensor:
    """The mean latents of uint8 [N, H, W, 3], not scaled: float32 [N, 4, H/8, W/8] on the CPU."""
    chunks = []
    for begin in range(0, len(images), 64):
        pixels = to_pixels(images[begin : begin + 64]).to(place.device)
        with place.autocast():
            chunks.append(vae.encode(pixels).latent_dist.mean.float().cpu())
    return torch.cat(chunks)


def train_decoder(course: Course, place: Place, tokenizer: Any, vae: Any) -> Any:
    """Train the decoder on whole pictures, in place; the encoder and its latents stay."""
    torch.manual_seed(place.seed)
    images, latents = zip(*paint_and_encode(place, tokenizer, vae), strict=True)
    scale = 1 / vae.config.scaling_factor
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True).train()

    def loss_of(draws: Draws) -> Tensor:
        kinds = [
            0 if draws.numpy.random() < 0.7 else 1 + index % 2 for index in range(course.batch_size)
        ]
        picks = [(kind, int(draws.numpy.integers(len(images[kind])))) for kind in kinds]
        pixels = to_pixels(np.stack([images[kind][i] for kind, i in picks])).to(place.device)
        chosen = torch.stack([latents[kind][i] for kind, i in picks])  # [B, 4, 16, 16]
        noise = torch.randn(chosen.shape, generator=draws.torch)
        with place.autocast():
            drawn = vae.decode((chosen + LATENT_NOISE * scale * noise).to(place.device)).sample
        return difference(drawn.float(), pixels)

    train("decoder", course, place, list(decoder.parameters()), loss_of)
    return vae.eval().requires_grad_(False)


def paint_and_encode(place: Place, tokenizer: Any, vae: Any) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Pictures of each style, the plain first, and the encoder's latents of them, unscaled.

    uint8 ``[N, H, W, 3]`` and float32 ``[N, 4, H / 8, W / 8]``.
    """
    counts = {"plain": NUM_PLAIN} | dict.fromkeys(LOOKS, NUM_STYLED)
    for style, count in counts.items():
        images = make_samples(place, tokenizer, (SIZE_PX, SIZE_PX), count, style).images
        yield images, encode(vae, images, place)


def difference(drawn: Tensor, pixels: Tensor) -> Tensor:
    """How far pictures are from those that they should be; both float32 [B, 3, H, W] in -1..1.

    The mean absolute plus mean squared error, and the absolute error of the horizontal and
    vertical differences between neighbouring pixels, which makes edges, stars and dots crisp.
    """
    loss: Tensor = F.l1_loss(drawn, pixels) + F.mse_loss(drawn, pixels)
    for axis in (2, 3):
        loss = loss + F.l1_loss(drawn.diff(dim=axis), pixels.diff(dim=axis))
    return loss


def _crops(sources: list[Samples], rng: np.random.Generator) -> Tensor:
    crops = []  # on the latents' own grid, so that a texture's phase is always the same
    for source in sources:
        picture = source.images[rng.integers(len(source))]
        top, left = VAE_SCALE_FACTOR * rng.integers(
            0, (picture.shape[0] - CROP_PX) // VAE_SCALE_FACTOR + 1, size=2
        )
        crops.append(picture[top : top + CROP_PX, left : left + CROP_PX])
    return to_pixels(np.stack(crops))
