"""From pixels to latents: what a row is encoded by.

A row that a tiny VAE decodes is encoded by it too, as diffusers' pipelines do that are given one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engines.drawing.inpainting import pixels_of

if TYPE_CHECKING:
    from engines.drawing.drawing import Drawing

PARTS = {"full": "vae_encoder", "tiny": "tiny_vae_encoder"}  # by encoder


class Encoding(NamedTuple):
    """What rows must have in common to share an encoding of their images."""

    encoder: str
    latents: tuple[int, ...]  # [C, h, w] of a row


def pixels_to_encode(drawings: Sequence[Drawing]) -> Tensor:
    """uint8 ``[B, H, W, 3]``"""
    return torch.from_numpy(np.stack([pixels_of(drawing.recipe) for drawing in drawings]))
