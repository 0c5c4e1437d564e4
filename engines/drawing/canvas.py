"""A picture that is decoded tile by tile, each faded into those above and to the left of it, or a
clip, a few frames at a time.

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

DOWN, ACROSS = -3, -2  # dimensions of pictures


class Blended(NamedTuple):
    """A tile as the picture has it: where it was decoded."""

    pixels: Tensor  # uint8 [..., h, w, 3], without what later tiles fade over
    bottom: Tensor  # float32 [..., ≤ blend, W, 3]
    right: Tensor  # float32 [..., H, ≤ blend, 3]


class Canvas:
    """The picture so far, ``pixels`` uint8 ``[H, W, 3]``; of a clip ``[F, H, W, 3]``."""

    def __init__(self, grid: Grid) -> None:
        self.index = 0  # of the tile that is next
        shape = (grid.scale * grid.rows, grid.scale * grid.columns, 3)
        self.pixels = np.empty((grid.frames, *shape) if grid.frames else shape, np.uint8)
        self._grid = grid
        self._bottoms: dict[int, Tensor] = {}  # by column, of the last tile there
        self._right: Tensor | None = None  # of the last tile

    @property
    def done(self) -> bool:
        return self.index == len(self._grid)

    def blend(self, tile: Tensor) -> Blended:
        """The next tile, float32 ``[H, W, 3]`` from -1 to 1, of a clip's frames ``[n, H, W, 3]``,
        faded into its neighbours. Nothing changes yet.
        """
        row, column = self._grid.place(self.index)
        if row:
            tile = _fade(self._bottoms[column], tile, DOWN)
        if column:
            assert self._right is not None, "tiles come line by line"
            tile = _fade(self._right, tile, ACROSS)
        blend, limit = self._grid.blend_px, self._grid.scale * self._grid.stride
        pixels = to_bytes(tile[..., :limit, :limit, :])
        return Blended(pixels, _end(tile, blend, DOWN), _end(tile, blend, ACROSS))

    def put(self, blended: Blended, pixels: np.ndarray) -> None:
        """Take the tile that was blended, its ``pixels`` on the host."""
        top, left = (self._grid.scale * side for side in self._grid.corner(self.index))
        *_, height, width, _ = pixels.shape
        canvas = self.pixels[self._grid.span(self.index)] if self._grid.frames else self.pixels
        canvas[..., top : top + height, left : left + width, :] = pixels
        self._bottoms[self._grid.place(self.index)[1]] = blended.bottom
        self._right = blended.right
        self.index += 1


def _end(tile: Tensor, extent: int, dim: int) -> Tensor:
    """A copy of the last lines along ``dim``, as many as there are of ``extent``."""
    extent = min(extent, tile.shape[dim])
    return tile.narrow(dim, tile.shape[dim] - extent, extent).clone()


def _fade(before: Tensor, tile: Tensor, dim: int) -> Tensor:
    """``tile`` with its first lines along ``dim`` fading in over the last of ``before``."""
    extent = min(before.shape[dim], tile.shape[dim])
    share = torch.arange(extent, device=tile.device) / extent
    share = share.reshape(-1, 1, 1) if dim == DOWN else share.reshape(-1, 1)
    start = before.narrow(dim, before.shape[dim] - extent, extent)
    faded = start * (1 - share) + tile.narrow(dim, 0, extent) * share
    return torch.cat([faded, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim)
