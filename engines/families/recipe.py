"""What one image is to be: all that a model and its samplers need to know of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Blend(NamedTuple):
    """Another prompt, and how far towards it what stands before it moves: 0 not at all, 1 whole."""

    prompt: str
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """``image`` (uint8 ``[H, W, 3]``) makes it image-to-image.

    With a ``mask`` (bool ``[H, W]``, of an image) only what is True there is drawn anew.
    ``timesteps`` are ``num_steps`` long; None leaves them to the sampler. ``num_frames`` is 1 but
    for models that draw clips.
    """

    prompt: str
    width_px: int
    height_px: int
    seed: int
    num_steps: int
    guidance_scale: float
    sampler: str
    timesteps: tuple[int, ...] | None = None
    negative_prompt: str | None = None  # to some models none is not the same as an empty one
    strength: float = 1.0
    eta: float | None = None
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    num_previews: int = 0
    num_frames: int = 1
    loras: Mapping[str, float] = field(default_factory=dict)  # name → λ, of those allowed
    decoder: str = "full"  # of `Facts.decoders`
    # SDXL's size conditioning in pixels, height before width; None: the size drawn, and no crop.
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    prompt_weighting: bool = False  # brackets in its texts are weights: engines.drawing.weighting
    blends: tuple[Blend, ...] = ()  # what the prompt's embeddings move towards, one by one
