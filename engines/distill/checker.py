"""Reads a picture of the world back into attributes, by colour distance and mask overlap alone.

Learns nothing and has seen no model's picture: what it says of a model is a measurement.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from engines.distill.painter import (
    INK,
    OUTLINE_SHARE,
    Floats,
    Pixels,
    background_rgb,
    checkered,
    object_rgb,
    shape_mask,
    striped,
)
from engines.distill.world import (
    BACKGROUND_COLORS,
    COLUMNS,
    OBJECT_COLORS,
    ROWS,
    SHAPES,
    SIZES,
    TIMES,
    Scene,
)

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Box = tuple[float, float, float, float]

MIN_IOU = 0.7  # of the object's mask with the drawn truth in its box; below it there is no shape
OBJECT_DISTANCE = 20.0  # RGB units from every shade of the background: another thing
BRIGHTNESS = (0.78, 1.15)  # how far slope, stripes and squares move a background along that line
NUM_SHADES = 13
OPENING_PX = 7  # night stars are smaller, every object is thicker
STYLE_ABOVE = 1.12  # light against dark of stripes or squares: 1 when plain, 1.34 painted
MAX_HALF = 0.4  # half a box as a share of the shorter side; the largest painted is 0.305
NOTHING = "none"


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the picture shows, in the world's words; NOTHING where it shows no such thing."""

    shape: str
    color: str
    size: str
    position: str
    background: str
    time: str
    line: str
    style: str
    box: Box | None = None  # of the object: left, top, right and bottom in pixels

    def agrees(self, scene: Scene, attribute: str) -> bool:
        """Whether the picture shows what the scene asks for."""
        return bool(getattr(self, attribute) == getattr(scene, attribute))


def read(pixels: Pixels) -> Reading:
    """Read a uint8 [H, W, 3] picture."""
    picture = pixels.astype(np.float32)
    background, time = _background(picture)
    mask = _object_mask(picture, background_rgb(background, time))
    style = _style(picture, mask)
    if not mask.any():
        return _nothing(background, time, style)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box_px = (float(columns[0]), float(rows[0]), columns[-1] + 1.0, rows[-1] + 1.0)
    height, width = mask.shape
    side = min(height, width)
    half = max(box_px[2] - box_px[0], box_px[3] - box_px[1]) / 2 / side
    if half > MAX_HALF:
        return _nothing(background, time, style)
    row = _nearest(ROWS, (box_px[1] + box_px[3]) / 2 / height)
    column = _nearest(COLUMNS, (box_px[0] + box_px[2]) / 2 / width)
    stroke_px = round(OUTLINE_SHARE * side)
    inside = _erode(mask, 2 * stroke_px + 3)
    inner_rgb = np.median(picture[inside if inside.any() else mask], axis=0)
    edge_rgb = np.median(picture[mask & ~_erode(mask, 2 * stroke_px - 1)], axis=0)
    return Reading(
        shape=_shape(mask, box_px),
        color=min(OBJECT_COLORS, key=lambda c: _distance(inner_rgb, object_rgb(c, time))),
        size=_nearest(SIZES, half),
        position=f"{row} {column}",
        background=background,
        time=time,
        line="outlined" if _distance(edge_rgb, INK) < 0.5 * _distance(inner_rgb, INK) else "flat",
        style=style,
        box=box_px,
    )


def _nothing(background: str, time: str, style: str) -> Reading:
    return Reading(NOTHING, NOTHING, NOTHING, NOTHING, background, time, NOTHING, style)


def _distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(np.asarray(one) - np.asarray(other)))


def _nearest(options: dict[str, float], value: float) -> str:
    return min(options, key=lambda name: abs(options[name] - value))


def _background(picture: Floats) -> tuple[str, str]:
    margin = max(2, min(picture.shape[:2]) // 16)
    ring = np.ones(picture.shape[:2], bool)
    ring[margin:-margin, margin:-margin] = False
    rgb = np.median(picture[ring], axis=0)
    pairs = [(color, time) for color in BACKGROUND_COLORS for time in TIMES]
    return min(pairs, key=lambda pair: _distance(rgb, background_rgb(*pair)))


def _object_mask(picture: Floats, background: Floats) -> Mask:
    """Whatever is not the background, in one piece thick enough to be no star and no dot."""
    shades = np.clip(np.linspace(*BRIGHTNESS, NUM_SHADES)[:, None] * background, 0, 255)
    distance = np.min([np.linalg.norm(picture - shade, axis=2) for shade in shades], axis=0)
    different = distance > OBJECT_DISTANCE
    grown = _erode(different, OPENING_PX)
    for _ in range(2 * OPENING_PX):  # back to its edges, but never across a gap
        grown = _filter(grown, ImageFilter.MaxFilter(3)) & different
    return grown


def _filter(mask: Mask, how: ImageFilter.Filter) -> Mask:
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(how)) > 127


def _erode(mask: Mask, size_px: int) -> Mask:
    return _filter(mask, ImageFilter.MinFilter(size_px)) if size_px >= 3 else mask


def _shape(mask: Mask, box_px: Box) -> str:
    height, width = mask.shape
    overlaps = {}
    for shape in SHAPES:
        truth = shape_mask(shape, box_px, width, height) > 0.5
        overlaps[shape] = (mask & truth).sum() / (mask | truth).sum()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= MIN_IOU else NOTHING


def _style(picture: Floats, mask: Mask) -> str:
    height, width = mask.shape
    brightness = picture.mean(axis=2)
    free = ~_filter(mask, ImageFilter.MaxFilter(5))

    def contrast(pattern: Floats) -> float:
        middle = (pattern.min() + pattern.max()) / 2
        dark, light = free & (pattern < middle), free & (pattern >= middle)
        if not (dark.any() and light.any()):
            return 1.0
        return float(np.median(brightness[light]) / max(1.0, float(np.median(brightness[dark]))))

    contrasts = {
        "striped": contrast(striped(width, height)),
        "checkered": contrast(checkered(width, height)),
    }
    strongest = max(contrasts, key=lambda name: contrasts[name])
    return strongest if contrasts[strongest] > STYLE_ABOVE else "plain"
