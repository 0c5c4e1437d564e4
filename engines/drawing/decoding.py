"""From latents to pixels: what a row is decoded by, and what a decode has brought it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from engines.drawing import transfers
from engines.drawing.canvas import Canvas
from engines.drawing.fitting import fit
from engines.drawing.stage import Stage

if TYPE_CHECKING:
    from engines.drawing.drawing import Drawing

PARTS = {"full": "vae_decoder", "tiny": "tiny_vae_decoder"}  # by decoder


class Decoding(NamedTuple):
    """What rows must have in common to share a decode."""

    decoder: str
    latents: tuple[int, ...]  # [C, h, w] of what is decoded of a row
    num_frames: int = 1  # of a clip, that one call decodes of a row


def latents_of(drawings: Sequence[Drawing]) -> Tensor:
    """float32 ``[B, C, h, w]``: of finished rows what they are, of others what they may become;
    of rows that are decoded in tiles, the next one; of clips the next frames, side by side.
    """
    return torch.cat([_latents_of(drawing) for drawing in drawings])


def _latents_of(drawing: Drawing) -> Tensor:
    """float32 ``[n, C, h, w]``"""
    latents = drawing.latents if drawing.stage is Stage.DECODE else drawing.denoised
    assert latents is not None, "there is something to decode"
    grid, index = drawing.grid, drawing.tile_index
    if grid is None:
        return latents[None]
    if not grid.frames:
        return latents[None, :, *grid.box(index)]
    return latents[:, grid.span(index), *grid.box(index)].transpose(0, 1)


def take_pixels(
    drawings: Sequence[Drawing], latents: Tensor, outputs: Mapping[str, Tensor], precision: str
) -> None:
    """Give each row its image, its preview or a tile of it, of a decoder's outputs for ``latents``.

    A row whose latents or pixels are no numbers any more gets a ``failure`` instead.
    """
    rows = len(drawings)
    sums = latents.reshape(rows, -1).sum(dim=1)  # finite where all of a row's are
    # Older bundles have none.
    sums_drawn = outputs["pixel_sums"].reshape(rows, -1).sum(1) if "pixel_sums" in outputs else sums
    # What may find no memory comes before any row changes: the call may be made again.
    canvases = [_canvas_of(drawing) for drawing in drawings]
    tiles = [
        None if canvas is None else canvas.blend(_of_row(outputs["image"], index, drawing))
        for index, (canvas, drawing) in enumerate(zip(canvases, drawings, strict=True))
    ]
    pixels = [
        outputs["pixels"][index] if tile is None else tile.pixels
        for index, tile in enumerate(tiles)
    ]
    sums, sums_drawn, *fetched = transfers.fetch(sums, sums_drawn, *pixels)
    finite, drawn = torch.isfinite(sums).tolist(), torch.isfinite(sums_drawn).tolist()
    for index, (drawing, canvas, tile) in enumerate(zip(drawings, canvases, tiles, strict=True)):
        picture = fetched[index].numpy()  # [H, W, 3], of a clip [n, H, W, 3]
        drawing.canvas = None
        if not finite[index]:
            drawing.failure = (
                f"after step {drawing.step_index} the latents are not all finite numbers; a "
                f"checkpoint that overflows in {precision} needs bf16 or fp32"
            )
            continue
        if not drawn[index]:
            drawing.failure = (
                f"the decoder overflowed in {precision} after step "
                f"{drawing.step_index}; this checkpoint's needs bf16 or fp32"
            )
            continue
        if canvas is not None and tile is not None:
            canvas.put(tile, picture)
            picture = canvas.pixels
            if not canvas.done:
                drawing.canvas = canvas
                continue
        if drawing.stage is Stage.DECODE:
            drawing.pixels = fit(picture, drawing.recipe)
            drawing.latents = drawing.denoised = None
        else:
            drawing.previews.append(fit(picture, drawing.recipe))


def _of_row(values: Tensor, index: int, drawing: Drawing) -> Tensor:
    """A decoder's output for the row of that index: of a picture one, of a clip each frame's."""
    if drawing.grid is None or not drawing.grid.frames:
        return values[index]
    count = drawing.decoding.num_frames
    return values[index * count : (index + 1) * count]


def _canvas_of(drawing: Drawing) -> Canvas | None:
    """What its tiles are put on; None of a row that is decoded whole."""
    if drawing.canvas is None and drawing.grid is not None:
        return Canvas(drawing.grid)
    return drawing.canvas
