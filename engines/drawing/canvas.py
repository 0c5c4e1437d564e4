"""A picture that is decoded tile by tile, each faded into those above and to the left of it.

Equal to ``AutoencoderKL.tiled_decode`` of diffusers; here one tile is one engine call, and of those
that were there no more is kept than what the next ones fade into.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engines.families.tiles import Grid
from engines.families.vae import to_bytes


class Blended(NamedTuple):
    """A tile as the picture has it: where it was decoded."""

    pixels: Tensor  # uint8 [h, w, 3], without what later tiles fade over
    bottom: Tensor  # float32 [≤ blend, W, 3]
    right: Tensor  # float32 [H, ≤ blend, 3]


class Canvas:
    """The picture so far."""

    def __init__(self, grid: Grid) -> None:
        self.index = 0  # of the tile that is next
        self.pixels = np.empty((grid.scale * grid.rows, grid.scale * grid.columns, 3), np.uint8)
        self._grid = grid
        self._bottoms: dict[int, Tensor] = {}  # by column, of the last tile there
        self._right: Tensor | None = None  # of the last tile

    @property
    def done(self) -> bool:
        return self.index == len(self._grid)

    def blend(self, tile: Tensor) -> Blended:
        """The next tile, float32 ``[H, W, 3]`` from -1 to 1, faded into its neighbours. Nothing
        changes yet.
        """
        row, column = divmod(self.index, self._grid.num_columns)
        if row:
            tile = _fade(self._bottoms[column], tile, dim=0)
        if column:
            assert self._right is not None, "tiles come line by line"
            tile = _fade(self._right, tile, dim=1)
        blend, limit = self._grid.blend_px, self._grid.scale * self._grid.stride
        return Blended(
            to_bytes(tile[:limit, :limit]), tile[-blend:].clone(), tile[:, -blend:].clone()
        )

    def put(self, blended: Blended, pixels: np.ndarray) -> None:
        """Take the tile that was blended, its ``pixels`` on the host."""
        top, left = (self._grid.scale * side for side in self._grid.corner(self.index))
        height, width, _ = pixels.shape
        self.pixels[top : top + height, left : left + width] = pixels
        self._bottoms[self.index % self._grid.num_columns] = blended.bottom
        self._right = blended.right
        self.index += 1


def _fade(before: Tensor, tile: Tensor, dim: int) -> Tensor:
    """``tile`` with its first lines along ``dim`` fading in over the last of ``before``."""
    extent = min(before.shape[dim], tile.shape[dim])
    share = torch.arange(extent, device=tile.device) / extent
    share = share.reshape(-1, 1, 1) if dim == 0 else share.reshape(1, -1, 1)
    start = before.narrow(dim, before.shape[dim] - extent, extent)
    faded = start * (1 - share) + tile.narrow(dim, 0, extent) * share
    return torch.cat([faded, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim)
