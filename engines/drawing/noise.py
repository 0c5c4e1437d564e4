"""A row's own noise, and what it begins from.

Each row's generator draws on the CPU in diffusers' order: a sample of the encoder's distribution,
the first noise, a sample of what a mask leaves of the image, then one draw a step. So a result
depends on nobody else, and on no device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.drawing.drawing import Drawing
from engines.drawing.inpainting import Kept, mask_of_latents


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


def begin_from_image(drawing: Drawing, mean: Tensor, std: Tensor | None, scale: int) -> None:
    """The image's latents, noised for the row's first timestep.

    ``mean, std`` float32 ``[C, h, w]`` on any device, ``std`` None of a tiny autoencoder, which
    answers with the latents themselves. ``scale``: pixels per latent side.
    """
    # From its first number on: a call that found no memory is made again.
    drawing.generator.manual_seed(drawing.recipe.seed)
    latents, mask = mean, drawing.recipe.mask
    if std is not None:
        latents = mean + std * draw_noise(drawing).to(mean.device)
    noise = draw_noise(drawing).to(mean.device)
    alpha, sigma = drawing.schedule.levels[0].tolist()
    if mask is not None:
        drawing.kept = Kept(mask_of_latents(mask, scale), latents, noise)
        if std is not None:
            draw_noise(drawing)  # diffusers encodes what the mask leaves of the image too
        if drawing.recipe.strength == 1:
            alpha, sigma = 0.0, drawing.schedule.init_noise
    drawing.latents = alpha * latents + sigma * noise
