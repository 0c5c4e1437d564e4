"""A picture that was drawn at another size than was asked for, brought to that size."""

from __future__ import annotations

import numpy as np
import torch

from engines.families.recipe import Recipe


def fit(pixels: np.ndarray, recipe: Recipe) -> np.ndarray:
    """uint8 ``[h, w, 3]`` to ``[H, W, 3]`` of the recipe: resized to cover it and cropped about
    the middle, as ``PixArtImageProcessor.resize_and_crop_tensor`` of diffusers but for values that
    were rounded before.
    """
    width, height = recipe.width_px, recipe.height_px
    *_, drawn_height, drawn_width, _ = pixels.shape
    if (drawn_height, drawn_width) == (height, width):
        return pixels
    ratio = max(height / drawn_height, width / drawn_width)
    # At least what is wanted: a product may come out a hair below the side that it stands for.
    size = (max(height, int(drawn_height * ratio)), max(width, int(drawn_width * ratio)))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()  # [1, 3, h, w]
    resized = torch.nn.functional.interpolate(image, size=size, mode="bilinear")
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cropped = resized[0, :, top : top + height, left : left + width]
    return cropped.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
