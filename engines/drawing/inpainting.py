"""What inpainting leaves of an image: after each step its latents, noised, stand where they stood.

The denoiser knows nothing of it, so that any engine's rows with and without masks share a batch.
A UNet that takes a mask sees instead what is to stay, at every step, and nothing is put back; a
row without a mask is to it one whose mask marks everything, without an image one of mid-grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engines.drawing import transfers
from engines.families.recipe import Recipe

if TYPE_CHECKING:
    from engines.drawing.drawing import Drawing


class Kept(NamedTuple):
    """One row's image, and where it stays."""

    mask: Tensor  # float32 [1, h, w], on the CPU: 1 where it is drawn anew, else 0
    latents: Tensor  # float32 [C, h, w]
    noise: Tensor  # as latents: the row's first


def begins_from_noise(recipe: Recipe) -> bool:
    """Whether the image counts only by what a mask leaves of it."""
    return recipe.image is None or recipe.strength == 1


def marked(recipe: Recipe) -> np.ndarray:
    """bool ``[H, W]``: what is drawn anew, all of it where there is no mask."""
    if recipe.mask is not None:
        return recipe.mask
    return np.ones((recipe.height_px, recipe.width_px), np.bool_)


def pixels_of(recipe: Recipe) -> np.ndarray:
    """uint8 ``[H, W, 3]``; black without an image, which a mask over everything hides."""
    if recipe.image is not None:
        return recipe.image
    return np.zeros((recipe.height_px, recipe.width_px, 3), np.uint8)


def mask_of_latents(mask: np.ndarray, scale: int) -> Tensor:
    """bool ``[H, W]`` as float32 ``[1, H/scale, W/scale]``, by nearest neighbour as diffusers."""
    return torch.from_numpy(mask[::scale, ::scale].astype(np.float32))[None]


class KeptLanes:
    """The images that the rows of a denoise call keep; those without a mask keep nothing."""

    def __init__(self, owners: Sequence[Drawing], num_steps: int, device: str) -> None:
        """``owners``: a row for each lane, at least one with a mask, and all before a step."""
        some = next(each.kept for each in owners if each.kept is not None)
        nothing = Kept(torch.ones_like(some.mask), *(torch.zeros_like(t) for t in some[1:]))
        masks, latents, noises = zip(*(each.kept or nothing for each in owners), strict=True)
        self._mask = transfers.stack(masks, device)  # [B, 1, h, w]
        self._latents = transfers.stack(latents, device)  # [B, C, h, w]
        self._noise = transfers.stack(noises, device)
        after = [each.step_index + 1 for each in owners]
        levels = np.stack(
            [each.schedule.levels[k : k + num_steps] for k, each in zip(after, owners, strict=True)]
        )
        levels = np.ascontiguousarray(levels.transpose(1, 2, 0))  # [S, 2, B]
        (self._levels,) = transfers.upload({"levels": torch.from_numpy(levels)}, device).values()

    def put_back(self, next_sample: Tensor, step: int) -> Tensor:
        """``(1 - mask) · (α · image + σ · noise) + mask · next``; α and σ are those after the step.

        Agrees with diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion_inpaint.py.
        """
        alpha, sigma = self._levels[step][:, :, None, None, None]  # [B, 1, 1, 1] each
        noised = alpha * self._latents + sigma * self._noise
        return torch.lerp(noised, next_sample, self._mask)  # exact at 0 and 1
