"""How large latents are cut into overlapping tiles, each decoded alone, as diffusers cuts them,
and clips into a few frames at a time.

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

    Of a clip of ``frames`` each tile is cut out of ``at_once`` of them, and all tiles of the first
    ones come before those of the next.
    """

    rows: int
    columns: int
    side: int
    scale: int
    frames: int = 0  # 0: a picture
    at_once: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether one tile is all there is of a picture."""
        return max(self.rows, self.columns) <= self.side

    @property
    def stride(self) -> int:
        return self.side if self.is_whole else self.side - self.side // FOURTHS

    @property
    def num_columns(self) -> int:
        """Of tiles."""
        return math.ceil(self.columns / self.stride)

    @property
    def num_tiles(self) -> int:
        """Of a picture."""
        return math.ceil(self.rows / self.stride) * self.num_columns

    def __len__(self) -> int:
        return math.ceil(max(1, self.frames) / self.at_once) * self.num_tiles

    @property
    def blend_px(self) -> int:
        """Over so many pixels a tile fades in."""
        return 0 if self.is_whole else self.scale * (self.side // FOURTHS)

    def place(self, index: int) -> tuple[int, int]:
        """Line and column of a tile among those of its picture."""
        return divmod(index % self.num_tiles, self.num_columns)

    def corner(self, index: int) -> tuple[int, int]:
        """Top and left of a tile in latents."""
        row, column = self.place(index)
        return row * self.stride, column * self.stride

    def box(self, index: int) -> tuple[slice, slice]:
        """Where a tile is in the latents of a picture."""
        top, left = self.corner(index)
        bottom, right = min(top + self.side, self.rows), min(left + self.side, self.columns)
        return slice(top, bottom), slice(left, right)

    def span(self, index: int) -> slice:
        """The frames of a clip that a tile is of."""
        first = index // self.num_tiles * self.at_once
        return slice(first, min(first + self.at_once, self.frames))

    def num_frames(self, index: int) -> int:
        """Pictures that a tile is cut out of."""
        span = self.span(index)
        return span.stop - span.start if self.frames else 1

    def shape(self, index: int) -> tuple[int, int]:
        """Rows and columns of a tile in latents."""
        down, across = self.box(index)
        return down.stop - down.start, across.stop - across.start

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Of all tiles."""
        return (self.shape(index) for index in range(len(self)))


def grid_of(
    rows: int, columns: int, tile_px: int, scale: int, frames: int = 0, at_once: int = 1
) -> Grid | None:
    """The tiles of latents; None of a picture that is decoded whole. ``tile_px`` 0 cuts none."""
    longest, side = max(rows, columns), tile_px // scale
    if tile_px and longest > side:
        return Grid(rows, columns, side, scale, frames, at_once)
    return Grid(rows, columns, longest, scale, frames, at_once) if frames else None


def check_tile(tile_px: int, scale: int) -> None:
    """Raise InvalidInput for a tile that does not overlap by whole latents."""
    if tile_px % (FOURTHS * scale):
        raise InvalidInput(
            "vae_tiling_px",
            tile_px,
            f"--vae-tiling-px is {tile_px}; it must be a multiple of {FOURTHS * scale}, or 0 for "
            "whole decodes",
        )
