"""A row's own noise, and what it begins from.

Each row's generator draws on the CPU in diffusers' order: a sample of the encoder's distribution,
the first noise, a sample of what a mask leaves of the image, then one draw a step. So a result
depends on nobody else, and on no device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engines.drawing.drawing import Drawing
from engines.drawing.inpainting import Kept, marked, mask_of_latents


def draw_noise(drawing: Drawing) -> Tensor:
    """Standard normal float32 ``[C, h, w]``, on the CPU."""
    return torch.randn(drawing.group.latents, generator=drawing.generator)


def draw_ahead(drawing: Drawing) -> None:
    """Noise for a row's next step, where it adds any and has none yet."""
    step, draws = drawing.step_index, drawing.schedule.draws_noise
    if drawing.step_noise is None and step < len(draws) and draws[step]:
        drawing.step_noise = draw_noise(drawing)


def begin_from_text(drawing: Drawing) -> None:
    """Pure noise."""
    drawing.latents = drawing.schedule.init_noise * draw_noise(drawing)


class Moments(NamedTuple):
    """What the encoder says of one picture: ``mean, std`` float32 ``[C, h, w]`` on any device.

    ``std`` is None of a tiny autoencoder, which answers with the latents themselves.
    """

    mean: Tensor
    std: Tensor | None

    def sample(self, drawing: Drawing) -> Tensor:
        """Latents, by the row's generator."""
        if self.std is None:
            return self.mean
        return self.mean + self.std * draw_noise(drawing).to(self.mean.device)


def begin_from_image(drawing: Drawing, encoded: Moments, scale: int) -> None:
    """The image's latents, noised for the row's first timestep.

    ``scale``: pixels per latent side.
    """
    # From its first number on: a call that found no memory is made again.
    drawing.generator.manual_seed(drawing.recipe.seed)
    latents, mask = encoded.sample(drawing), drawing.recipe.mask
    noise = draw_noise(drawing).to(latents.device)
    alpha, sigma = drawing.schedule.levels[0].tolist()
    if mask is not None:
        drawing.kept = Kept(mask_of_latents(mask, scale), latents, noise)
        if encoded.std is not None:
            draw_noise(drawing)  # diffusers encodes what the mask leaves of the image too
        if drawing.recipe.strength == 1:
            alpha, sigma = 0.0, drawing.schedule.init_noise
    drawing.latents = alpha * latents + sigma * noise


def begin_with_mask(drawing: Drawing, encoded: Moments | None, masked: Moments, scale: int) -> None:
    """A row whose UNet sees the mask and ``masked``, what that leaves of the image.

    ``encoded`` is the image itself, None where `begins_from_noise`; ``scale`` as above.
    """
    drawing.generator.manual_seed(drawing.recipe.seed)
    alpha, sigma = drawing.schedule.levels[0].tolist()
    latents = torch.zeros_like(masked.mean)
    if encoded is None:
        alpha, sigma = 0.0, drawing.schedule.init_noise
    else:
        latents = encoded.sample(drawing)
    noise = draw_noise(drawing).to(latents.device)
    mask = mask_of_latents(marked(drawing.recipe), scale)
    drawing.conditioning |= {"masked_latents": (masked.sample(drawing),), "mask": (mask,)}
    drawing.latents = alpha * latents + sigma * noise
