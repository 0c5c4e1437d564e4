"""Whether a frame says what the picture that is shown was drawn from: such a one is skipped."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from engines.families.recipe import Blend
from service.web.masks import Edited

SIDE_PX = 32  # of the grey copies that are compared
MAX_SKIPPED = 10  # in a row, as StreamDiffusion has it


class Look(NamedTuple):
    """What a picture is drawn from, as far as another frame is compared with it."""

    values: dict[str, Any]
    blends: tuple[Blend, ...]
    copy: np.ndarray | None  # grey float64 [32, 32]; None: drawn from the prompt alone
    mask: bytes | None

    @classmethod
    def of(cls, values: dict[str, Any], blends: tuple[Blend, ...], edited: Edited | None) -> Look:
        """Of a frame's values and pixels."""
        if edited is None:
            return cls(values, blends, None, None)
        mask = None if edited.mask is None else edited.mask.tobytes()
        return cls(values, blends, grey_copy(edited.pixels), mask)

    def is_like(self, other: Look, similarity: float) -> bool:
        """Whether the two are of one kind and their pictures' cosine is at least ``similarity``;
        never where each frame has a new seed."""
        if self.values.get("seed") is None:
            return False
        if (self.values, self.blends, self.mask) != (other.values, other.blends, other.mask):
            return False
        if self.copy is None or other.copy is None:
            return self.copy is other.copy
        return cosine(self.copy, other.copy) >= similarity


class Shown:
    """The look of the last picture that was drawn, and how many frames were skipped since."""

    def __init__(self) -> None:
        self._look: Look | None = None
        self._num_skipped = 0

    def draw(self, look: Look) -> None:
        """A picture of this look has been drawn."""
        self._look, self._num_skipped = look, 0

    def skip(self, look: Look, similarity: float | None) -> bool:
        """Whether to skip a frame of this look; counts it if so."""
        if similarity is None or self._look is None or self._num_skipped >= MAX_SKIPPED:
            return False
        like = look.is_like(self._look, similarity)
        self._num_skipped += like
        return like


def grey_copy(pixels: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, 3]`` as a small grey copy, float64."""
    small = Image.fromarray(pixels).convert("L").resize((SIDE_PX,) * 2, Image.Resampling.BOX)
    return np.asarray(small, np.float64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the angle between two pictures; two black ones are alike."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norms if norms else float(np.array_equal(a, b))
