"""How large latents are cut into overlapping tiles, each decoded alone, as diffusers cuts them.

Agrees with ``tiled_decode`` of diffusers/models/autoencoders/autoencoder_kl.py. Layout alone; the
pictures are `engines.drawing.canvas`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from engines.errors import InvalidInput

FOURTHS = 4  # a tile overlaps the next by one of them: diffusers' tile_overlap_factor of 0.25


@dataclass(frozen=True, slots=True)
class Grid:
    """The tiles of latents of ``rows`` × ``columns``, line by line; ``side`` and those in latents,
    of ``scale`` pixels each way. Those at the right and below are what is left.
    """

    rows: int
    columns: int
    side: int
    scale: int

    @property
    def stride(self) -> int:
        return self.side - self.side // FOURTHS

    @property
    def num_columns(self) -> int:
        """Of tiles."""
        return math.ceil(self.columns / self.stride)

    def __len__(self) -> int:
        return math.ceil(self.rows / self.stride) * self.num_columns

    @property
    def blend_px(self) -> int:
        """Over so many pixels a tile fades in."""
        return self.scale * (self.side // FOURTHS)

    def corner(self, index: int) -> tuple[int, int]:
        """Top and left of a tile in latents."""
        row, column = divmod(index, self.num_columns)
        return row * self.stride, column * self.stride

    def box(self, index: int) -> tuple[slice, slice]:
        """Where a tile is in the latents."""
        top, left = self.corner(index)
        bottom, right = min(top + self.side, self.rows), min(left + self.side, self.columns)
        return slice(top, bottom), slice(left, right)

    def shape(self, index: int) -> tuple[int, int]:
        """Rows and columns of a tile in latents."""
        down, across = self.box(index)
        return down.stop - down.start, across.stop - across.start

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Of all tiles."""
        return (self.shape(index) for index in range(len(self)))


def grid_of(rows: int, columns: int, tile_px: int, scale: int) -> Grid | None:
    """The tiles of latents; None where they are decoded whole. ``tile_px`` 0 cuts none."""
    side = tile_px // scale
    return Grid(rows, columns, side, scale) if tile_px and max(rows, columns) > side else None


def check_tile(tile_px: int, scale: int) -> None:
    """Raise InvalidInput for a tile that does not overlap by whole latents."""
    if tile_px % (FOURTHS * scale):
        raise InvalidInput(
            "vae_tiling_px",
            tile_px,
            f"--vae-tiling-px is {tile_px}; it must be a multiple of {FOURTHS * scale}, or 0 for "
            "whole decodes",
        )
