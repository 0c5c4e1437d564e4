"""Paints a scene: pure drawing with Pillow and numpy, the same pixels for the same scene.

Owns shapes, colours by day and night, outlines and style textures. Reads no text, trains nothing.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from engines.distill.world import (
    BACKGROUND_COLORS,
    COLUMNS,
    OBJECT_COLORS,
    ROWS,
    SIZES,
    Scene,
)

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Points = list[tuple[float, float]]

SUPERSAMPLE = 4  # edges are drawn at 4 times the size and averaged: 16 levels of coverage
INK = (12.0, 12.0, 18.0)
NIGHT_BACKGROUND = 0.40  # how much light the night leaves on the background
NIGHT_OBJECT = 0.80
OUTLINE_SHARE = 0.035  # outline width as a share of the shorter side: 4.5 px at 128
DOOR_SHADE = 0.55
# Textures repeat every 32 px, one cell of the UNet's lowest level. Rays from the middle do not and
# were learnt far more slowly; dots 8 px apart are lost in the autoencoder's latents by night.
TEXTURE_PX = 32
_STARS = ((0.07, 0.12), (0.33, 0.05), (0.62, 0.1), (0.93, 0.07), (0.06, 0.46), (0.95, 0.4),
          (0.1, 0.8), (0.36, 0.94), (0.66, 0.92), (0.93, 0.86))  # fmt: skip


def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float, end: float) -> Points:
    angles = np.linspace(math.radians(start), math.radians(end), 48)
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _star() -> Points:
    radii = (1.0, 0.45)
    turns = [(math.radians(36 * k - 90), radii[k % 2]) for k in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in turns]


def _heart() -> Points:
    angles = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    return [
        (
            16 * math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
        )
        for a in angles
    ]


_OUTLINES: dict[str, Points] = {
    "circle": _ellipse(0, 0, 1, 1, 0, 352.5),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "star": _star(),
    "heart": _heart(),
    "moon": _ellipse(0, 0, 1, 1, 55, 305) + _ellipse(0.42, 0, 0.7, 0.82, 272, 88),
    "house": [(0, -1), (0.55, -0.45), (0.55, -0.9), (0.8, -0.9), (0.8, -0.2), (1, 0), (0.8, 0),
              (0.8, 1), (-0.8, 1), (-0.8, 0), (-1, 0)],
    "tree": [(0, -1), (0.55, -0.3), (0.3, -0.3), (1, 0.5), (0.22, 0.5), (0.22, 1), (-0.22, 1),
             (-0.22, 0.5), (-1, 0.5), (-0.3, -0.3), (-0.55, -0.3)],
}  # fmt: skip


@functools.cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The shape's polygon, scaled so that its box is exactly [-1, 1] x [-1, 1]."""
    points = np.array(_OUTLINES[shape])
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / (high - low) * 2 - 1
    return tuple((float(x), float(y)) for x, y in scaled)


def box(scene: Scene, width_px: int, height_px: int) -> tuple[float, float, float, float]:
    """The object's left, top, right, bottom in pixels."""
    side = min(width_px, height_px)
    half = SIZES[scene.size] * scene.stretch * side
    cx = COLUMNS[scene.column] * width_px + scene.shift[0] * side
    cy = ROWS[scene.row] * height_px + scene.shift[1] * side
    return cx - half, cy - half, cx + half, cy + half


def shape_mask(
    shape: str,
    box_px: tuple[float, float, float, float],
    width_px: int,
    height_px: int,
    *,
    stroke_px: float = 0.0,
) -> Floats:
    """Coverage of the filled shape, or of its inner stroke: float32 [H, W] in 0..1."""
    left, top, right, bottom = box_px
    canvas = Image.new("L", (width_px * SUPERSAMPLE, height_px * SUPERSAMPLE), 0)
    half_x, half_y = (right - left) / 2, (bottom - top) / 2
    points = [
        (
            ((x + 1) * half_x + left) * SUPERSAMPLE,
            ((y + 1) * half_y + top) * SUPERSAMPLE,
        )
        for x, y in outline(shape)
    ]
    draw = ImageDraw.Draw(canvas)
    if stroke_px:
        width = max(1, round(stroke_px * SUPERSAMPLE))
        draw.line([*points, points[0], points[1]], fill=255, width=2 * width, joint="curve")
    else:
        draw.polygon(points, fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / np.float32(255)


def background_rgb(background: str, time: str) -> Floats:
    """The background's mean colour: float32 [3], 0..255."""
    rgb = np.array(BACKGROUND_COLORS[background], np.float32)
    return rgb * NIGHT_BACKGROUND if time == "night" else rgb


def object_rgb(color: str, time: str) -> Floats:
    """The object's mean colour: float32 [3], 0..255."""
    rgb = np.array(OBJECT_COLORS[color], np.float32)
    return rgb * NIGHT_OBJECT if time == "night" else rgb


def paint(scene: Scene, width_px: int = 128, height_px: int = 128) -> Pixels:
    """Paint the scene: uint8 [H, W, 3]."""
    box_px = box(scene, width_px, height_px)
    slope = np.linspace(-1, 1, height_px, dtype=np.float32)[:, None, None]
    picture = background_rgb(scene.background, scene.time) * (1 + 0.04 * slope)
    picture = np.broadcast_to(picture, (height_px, width_px, 3)).copy()
    if scene.style == "checkered":
        picture *= checkered(width_px, height_px)[..., None]
    if scene.time == "night":
        _add_stars(picture)
    mask = shape_mask(scene.shape, box_px, width_px, height_px)[..., None]
    fill = np.broadcast_to(object_rgb(scene.color, scene.time), picture.shape).copy()
    if scene.shape == "house":
        _add_door(fill, box_px)
    picture += (fill - picture) * mask
    if scene.line == "outlined":
        stroke_px = OUTLINE_SHARE * min(width_px, height_px)
        ink = shape_mask(scene.shape, box_px, width_px, height_px, stroke_px=stroke_px)[..., None]
        picture += (np.array(INK, np.float32) - picture) * ink * mask
    if scene.style == "striped":
        picture *= striped(width_px, height_px)[..., None]
    return np.asarray(np.clip(np.rint(picture), 0, 255), np.uint8)


def _add_stars(picture: Floats) -> None:
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for u, v in _STARS:
        distance = np.hypot(x - u * width, y - v * height)
        glow = np.clip(2.4 - distance, 0, 1)[..., None]
        picture += (np.array((235, 235, 215), np.float32) - picture) * glow


def _add_door(fill: Floats, box_px: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = box_px
    half = (right - left) / 2
    cx, y0 = (left + right) / 2, top + 1.3 * half
    rows = slice(max(0, round(y0)), max(0, round(bottom)))
    fill[rows, max(0, round(cx - 0.2 * half)) : max(0, round(cx + 0.2 * half))] *= DOOR_SHADE


def _light_and_dark(wave: Floats) -> Floats:
    """A wave in -1..1 to a factor of brightness from 0.82 to 1.10 with firm edges."""
    return np.asarray(0.96 + 0.14 * np.clip(4 * wave, -1, 1), np.float32)


@functools.cache
def striped(width_px: int, height_px: int) -> Floats:
    """Slanting stripes over the whole picture: a factor per pixel, float32 [H, W]."""
    y, x = np.mgrid[0:height_px, 0:width_px].astype(np.float32)
    return _light_and_dark(np.sin((x + y + 1) * (2 * np.pi / TEXTURE_PX)))


@functools.cache
def checkered(width_px: int, height_px: int) -> Floats:
    """Squares behind the object: a factor per pixel, float32 [H, W]."""
    y, x = np.mgrid[0:height_px, 0:width_px].astype(np.float32) + np.float32(0.5)
    across, down = (np.sin(side * (2 * np.pi / TEXTURE_PX)) for side in (x, y))
    return _light_and_dark(across * down)
