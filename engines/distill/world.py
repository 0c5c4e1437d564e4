"""The picture world: what a scene can be, which scenes are held out, and how scenes are drawn lots.

Owns the vocabulary of attributes and the hold-outs. Knows nothing of pixels, text or networks.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "house", "tree")
OBJECT_COLORS = {  # sRGB by day, chosen at least 75 apart from each other and every background
    "red": (215, 35, 40),
    "orange": (245, 130, 20),
    "brown": (115, 65, 30),
    "teal": (0, 125, 125),
    "navy": (35, 45, 135),
    "purple": (135, 45, 175),
    "black": (40, 40, 45),
    "silver": (165, 168, 178),
}
BACKGROUND_COLORS = {
    "white": (244, 243, 238),
    "yellow": (250, 220, 90),
    "green": (110, 195, 105),
    "blue": (110, 185, 240),
    "pink": (250, 165, 190),
}
SIZES = {"small": 0.21, "large": 0.29}  # half the object's box, as a share of the shorter side
COLUMNS = {"left": 0.3, "center": 0.5, "right": 0.7}
ROWS = {"top": 0.3, "middle": 0.5, "bottom": 0.7}
TIMES = ("day", "night")
LINES = ("flat", "outlined")
LOOKS = ("striped", "checkered")  # never shown to the base model: LoRAs bring them
STYLES = ("plain", *LOOKS)

ATTRIBUTES = ("shape", "color", "size", "position", "background", "time", "line")


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture's truth. The jitters are shares of the shorter side (shift) and of the size."""

    shape: str
    color: str
    size: str
    column: str
    row: str
    background: str
    time: str = "day"
    line: str = "flat"
    style: str = "plain"
    shift: tuple[float, float] = (0.0, 0.0)
    stretch: float = 1.0

    @property
    def position(self) -> str:
        """Row and column in one word pair, e.g. `top left`, `middle center`."""
        return f"{self.row} {self.column}"


# Held out of training: every shape in one colour and at one place. Both rules are Latin diagonals,
# so that every shape, colour and place alone is still seen often.
HELD_OUT_COLORS = dict(zip(SHAPES, OBJECT_COLORS, strict=True))
_PLACES = [f"{row} {column}" for row, column in itertools.product(ROWS, COLUMNS)]
HELD_OUT_PLACES = dict(zip(SHAPES, _PLACES[1:], strict=True))


def is_held_out(scene: Scene) -> bool:
    """Whether training must never see this shape in this colour, or at this place."""
    return (
        HELD_OUT_COLORS[scene.shape] == scene.color
        or HELD_OUT_PLACES[scene.shape] == scene.position
    )


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def draw_scene(rng: np.random.Generator, *, style: str = "plain", held_out: bool = False) -> Scene:
    """Draw one scene, jittered; `held_out` chooses the side of the split it comes from."""
    while True:
        scene = Scene(
            shape=_pick(rng, SHAPES),
            color=_pick(rng, tuple(OBJECT_COLORS)),
            size=_pick(rng, tuple(SIZES)),
            column=_pick(rng, tuple(COLUMNS)),
            row=_pick(rng, tuple(ROWS)),
            background=_pick(rng, tuple(BACKGROUND_COLORS)),
            time="night" if rng.random() < 0.4 else "day",
            line="outlined" if rng.random() < 0.4 else "flat",
            style=style,
            shift=(float(rng.uniform(-0.02, 0.02)), float(rng.uniform(-0.02, 0.02))),
            stretch=float(rng.uniform(0.95, 1.05)),
        )
        if is_held_out(scene) == held_out:
            return scene
