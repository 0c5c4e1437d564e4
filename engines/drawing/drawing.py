"""One image on its way: what was asked for, and the tensors an engine takes one step further."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Generator, Tensor

from engines.backends.adapters import AdapterSet
from engines.drawing.canvas import Canvas
from engines.drawing.decoding import Decoding
from engines.drawing.encoding import Encoding
from engines.drawing.inpainting import Kept
from engines.drawing.stage import Stage
from engines.drawing.texts import Texts
from engines.families.family import Lanewise
from engines.families.recipe import Recipe
from engines.families.tiles import Grid
from engines.samplers import Schedule


class Group(NamedTuple):
    """What rows must have in common to share an engine call; of the VAE's see `Encoding` and
    `Decoding`.
    """

    latents: tuple[int, ...]  # shape of a row's
    loras: AdapterSet
    conditioning: Hashable = ()  # shapes of it, where not all rows have the same
    num_chunks: int = 1  # of the texts, on which the length of their embeddings depends


@dataclass(slots=True, eq=False)
class Drawing:
    """One row, advanced in place by the runner's engine calls."""

    recipe: Recipe
    schedule: Schedule
    group: Group
    generator: Generator  # the row's own, on the CPU: results ignore neighbours and devices
    texts: Texts
    tables: Mapping[str, np.ndarray]  # float32 [num_steps, ...]: the denoiser's, a line a step
    conditioning: dict[str, Lanewise]  # the denoiser's too; what texts say, by encode_text
    text_encoded: bool = False
    # float32 [C, h, w], of a clip [C, F, h, w], by start or encode_image
    latents: Tensor | None = None
    denoised: Tensor | None = None  # as `latents`, by denoise: the current guess
    kept: Kept | None = None  # by encode_image, where there is a mask that the UNet does not see
    step_index: int = 0  # by denoise
    preview_steps: frozenset[int] = frozenset()  # step indices after which a preview is due
    encoder: str = "full"
    preview_decoder: str = "full"
    grid: Grid | None = None  # of the tiles it is decoded in, and frames; None: whole
    canvas: Canvas | None = None  # by decode, between two tiles
    previews: list[np.ndarray] = field(default_factory=list)  # as `pixels`, by decode
    pixels: np.ndarray | None = None  # uint8 [H, W, 3], of a clip [F, H, W, 3], by decode
    # Drawn for the step that is next: a call that failed and is made again must draw no other.
    step_noise: Tensor | None = None
    failure: str | None = None  # by decode, where there is nothing to decode

    @property
    def num_lanes(self) -> int:
        """2 where classifier-free guidance needs an unconditional row."""
        return len(self.texts.lanes)

    @property
    def num_pictures(self) -> int:
        """What it takes of a denoise call: its lanes, of a clip each frame of them."""
        return self.num_lanes * self.recipe.num_frames

    @property
    def num_truncated_tokens(self) -> tuple[int, ...]:
        """Of each lane's text: for how many there is no room."""
        return tuple(0 if text is None else text.num_truncated for text in self.texts.lanes)

    @property
    def num_steps(self) -> int:
        return self.schedule.num_steps

    @property
    def stage(self) -> Stage:
        """What this row needs next."""
        if self.pixels is not None or self.failure is not None:
            return Stage.DONE
        if not self.text_encoded:
            return Stage.ENCODE_TEXT
        if self.latents is None:
            return Stage.ENCODE_IMAGE
        num_due = sum(step < self.step_index for step in self.preview_steps)
        if len(self.previews) < num_due:
            return Stage.PREVIEW
        return Stage.DENOISE if self.step_index < self.num_steps else Stage.DECODE

    @property
    def encoding(self) -> Encoding:
        """How its image is encoded."""
        return Encoding(self.encoder, self.group.latents)

    @property
    def decoding(self) -> Decoding:
        """How this row is decoded next."""
        preview = self.stage is Stage.PREVIEW
        decoder = self.preview_decoder if preview else self.recipe.decoder
        shape, index = self.group.latents, self.tile_index
        if self.grid is None:
            return Decoding(decoder, shape)
        shape = (shape[0], *self.grid.shape(index))
        return Decoding(decoder, shape, self.grid.num_frames(index))

    @property
    def tile_index(self) -> int:
        """Of the tile that is decoded next."""
        return 0 if self.canvas is None else self.canvas.index

    @property
    def alike(self) -> Group | Encoding | Decoding:
        """What rows that share this one's next engine call have too."""
        match self.stage:
            case Stage.ENCODE_IMAGE:
                return self.encoding
            case Stage.PREVIEW | Stage.DECODE:
                return self.decoding
        return self.group

    def condition(self, name: str) -> Lanewise:
        """What an input of the denoiser's is to be, for each lane."""
        values = self.conditioning[name]
        return values if len(values) == self.num_lanes else values * self.num_lanes


def spread_previews(num_previews: int, num_steps: int) -> frozenset[int]:
    """Evenly spaced step indices for previews; the last step is the image itself, never one."""
    count = min(num_previews, num_steps - 1)
    return frozenset(round((k + 1) * num_steps / (count + 1)) - 1 for k in range(count))
