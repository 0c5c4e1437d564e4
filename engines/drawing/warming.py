"""What a runner draws before it serves, so that no request pays for a first time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.drawing.stage import Stage
from engines.errors import EngineError

if TYPE_CHECKING:
    from engines.drawing.drawing import Drawing
    from engines.drawing.runner import Runner


def draw_every_batch(runner: Runner, loras: Mapping[str, float]) -> None:
    """Every part once at every batch size that serving may ask of it, the largest first: what is
    allocated for that one serves the smaller ones too.

    On a GPU twice, since a call that comes again is captured. A CPU prepares nothing for a size:
    there the largest and the smallest will do, and a clip of one frame.

    Raises:
        EngineError: an engine fails, or draws what is no picture.
    """
    info = runner.info
    turns = range(1 if runner.device == "cpu" else 2)
    num_frames = 1 if runner.device == "cpu" else info.default_num_frames
    at_once = max(2, info.max_batch // num_frames)  # a clip with guidance has two lanes
    for count, turn in itertools.product(_counts(runner.device, info.max_batch), turns):
        rows = _rows(runner, count, loras, f"text {turn}", num_frames=num_frames)
        runner.encode_text(rows)
        pictured = [row for row in rows if row.stage is Stage.ENCODE_IMAGE]
        for first in range(0, len(pictured), info.max_decode_batch):  # to a UNet that takes a mask
            runner.encode_image(pictured[first : first + info.max_decode_batch])
        if count <= at_once:
            runner.denoise(rows)
    for count, turn in itertools.product(_counts(runner.device, info.max_decode_batch), turns):
        rows = _decodable(runner, count, loras, f"picture {turn}")
        for decoder in info.decoders:
            _decode(runner, rows, decoder)


def _decodable(runner: Runner, count: int, loras: Mapping[str, float], name: str) -> list[Drawing]:
    """Finished rows, whose next call decodes ``count`` pictures: a row each, or a clip of them."""
    if runner.info.draws_clips:
        num_frames = min(count, runner.info.max_num_frames)
        rows = _rows(runner, 1, loras, f"{name} {count}", num_frames=num_frames)
        runner.encode_text(rows)
        return [dataclasses.replace(row, step_index=row.num_steps) for row in rows]  # noise will do
    rows = _rows(runner, count, loras, name, picture=True)
    runner.encode_text(rows)
    for encoder in sorted(runner.info.encoders, key=lambda each: each == rows[0].encoder):
        for row in rows:
            row.encoder = encoder
        runner.encode_image(rows)
    runner.denoise(rows)
    return rows


def _decode(runner: Runner, rows: Sequence[Drawing], decoder: str) -> None:
    """Decode copies of the rows, which stay as they are."""
    copies = [
        dataclasses.replace(row, recipe=dataclasses.replace(row.recipe, decoder=decoder))
        for row in rows
    ]
    while copies[0].stage is Stage.DECODE:  # more than once where it is in tiles
        runner.decode(copies)
    for row in copies:
        if row.failure is not None:
            raise EngineError(row.failure)


def _counts(device: str, largest: int) -> Iterable[int]:
    return sorted({1, largest}, reverse=True) if device == "cpu" else range(largest, 0, -1)


def _rows(
    runner: Runner, count: int, loras: Mapping[str, float], name: str, *, picture: bool = False,
    **changes: Any,
) -> list[Drawing]:  # fmt: skip
    """Rows of one step and one lane, each with a prompt that no other batch has had."""
    info = runner.info
    plain = runner.default_recipe(0)
    image = np.full((plain.height_px, plain.width_px, 3), 127, np.uint8) if picture else None
    guidance = info.default_guidance_scale if info.guidance_embedding else 1.0
    return [
        runner.start(
            dataclasses.replace(
                plain, prompt=f"{name} {count} {seed}", seed=seed, loras=loras,
                guidance_scale=guidance, image=image, **changes,
            )
        )
        for seed in range(count)
    ]  # fmt: skip
