"""Stage 7: a tiny autoencoder of the same latents, for whoever wants pictures sooner.

TAESD's architecture (diffusers' ``AutoencoderTiny``): convolutions and ReLUs, no normalisation, so
that a decode costs a quarter of the full one's time. It learns from painted pictures and from the
latents that the full encoder gives for them: its decoder to draw the pictures, its encoder to give
those latents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engines.distill.networks import SIZE_PX, VAE_SCALE_FACTOR, build_tiny_vae
from engines.distill.samples import to_pixels
from engines.distill.training import Course, Draws, Place, train
from engines.distill.vae import LATENT_NOISE, difference, paint_and_encode

COURSE = Course(num_steps=12_000, batch_size=16, learning_rate=2e-3, average=0.998)
CROP = 8  # latents a side: a step costs a quarter of a whole picture's
CROP_PX = VAE_SCALE_FACTOR * CROP
NUM_CORNERS = SIZE_PX // VAE_SCALE_FACTOR - CROP + 1  # where a crop may begin, each way
PLAIN_SHARE = 0.7  # of the rows; the others are of a style
ENCODER_WEIGHT = 0.5  # of the latents' error beside the pixels'


def train_tiny_vae(course: Course, place: Place, tokenizer: Any, vae: Any) -> Any:
    """Train and return an AutoencoderTiny for the scaled latents of ``vae``, which stays."""
    torch.manual_seed(place.seed)
    tiny = build_tiny_vae().to(device=place.device, memory_format=torch.channels_last)
    images, unscaled = zip(*paint_and_encode(place, tokenizer, vae), strict=True)
    latents = [each * vae.config.scaling_factor for each in unscaled]

    def loss_of(draws: Draws) -> Tensor:
        rows = course.batch_size
        styled = draws.numpy.random(rows) > PLAIN_SHARE
        kinds = np.where(styled, draws.numpy.integers(1, len(images), size=rows), 0)
        picks = [(kind, int(draws.numpy.integers(len(images[kind])))) for kind in kinds]
        corners = draws.numpy.integers(0, NUM_CORNERS, size=(rows, 2))  # of latents
        crops, shown = [], []
        for (kind, index), (top, left) in zip(picks, corners, strict=True):
            crops.append(latents[kind][index][:, top : top + CROP, left : left + CROP])
            top, left = VAE_SCALE_FACTOR * top, VAE_SCALE_FACTOR * left
            shown.append(images[kind][index][top : top + CROP_PX, left : left + CROP_PX])
        pixels = _channels_last(to_pixels(np.stack(shown)), place)
        chosen = torch.stack(crops)  # [B, 4, CROP, CROP]
        noisy = chosen + LATENT_NOISE * torch.randn(chosen.shape, generator=draws.torch)
        with place.autocast():
            drawn = tiny.decode(_channels_last(noisy, place)).sample
            encoded = tiny.encode(pixels).latents
        loss = difference(drawn.float(), pixels)
        return loss + ENCODER_WEIGHT * F.mse_loss(encoded.float(), chosen.to(place.device))

    train("tiny-vae", course, place, list(tiny.parameters()), loss_of)
    return tiny.eval().requires_grad_(False)


def _channels_last(tensor: Tensor, place: Place) -> Tensor:
    """A step of such small networks then takes two thirds of the time on a CPU."""
    return tensor.to(place.device, memory_format=torch.channels_last)
