"""Words for a scene: the canonical caption and its many paraphrases, all lower case English."""

from __future__ import annotations

import numpy as np

from engines.distill.world import BACKGROUND_COLORS, COLUMNS, OBJECT_COLORS, ROWS, SHAPES, Scene

_SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
    "center": ("center", "centre", "middle"),
    "purple": ("purple", "purple", "violet"),
    "silver": ("silver", "grey", "gray"),
    "moon": ("moon", "moon", "crescent"),
    "square": ("square", "square", "box"),
    "circle": ("circle", "circle", "ball"),
}
_OPENINGS = ("a", "a", "a", "a picture of a", "a drawing of a", "a photo of a", "one", "the")
_PLACES = ("{} background", "{} background", "{} backdrop")
WORDS = tuple(
    dict.fromkeys(
        " ".join(
            (
                "a an the one of on over in at by with and , . picture drawing photo",
                "background backdrop night day outlined flat outline outlines style",
                "halftone sunburst dots rays left right side",
                *(word for options in _SYNONYMS.values() for word in options),
                *SHAPES,
                *OBJECT_COLORS,
                *BACKGROUND_COLORS,
                *COLUMNS,
                *ROWS,
            )
        ).split()
    )
)


def place(scene: Scene) -> str:
    """The position as people say it: `center`, `top`, `left`, `top left` ..."""
    if scene.row == "middle":
        return scene.column
    return scene.row if scene.column == "center" else f"{scene.row} {scene.column}"


def caption(scene: Scene) -> str:
    """The canonical caption: every attribute once, the one the evaluation asks with."""
    text = (
        f"a {scene.size} {scene.color} {scene.shape} at the {place(scene)} "
        f"on a {scene.background} background, {_time(scene)}, {scene.line}"
    )
    return text if scene.style == "plain" else f"{text}, {scene.style}"


def paraphrase(scene: Scene, rng: np.random.Generator) -> str:
    """One of the scene's captions: other words, other order, some attributes left unsaid.

    Day and flat are what a picture is when nobody says otherwise: night and outlined are always
    said.
    """

    def word(name: str) -> str:
        options = _SYNONYMS.get(name, (name,))
        return options[int(rng.integers(len(options)))]

    if rng.random() < 0.4:
        return caption(scene)
    size = "" if rng.random() < 0.1 else f"{word(scene.size)} "
    where = place(scene)
    where = word(where) if where == "center" else where
    at = "" if rng.random() < 0.1 else f" {'in' if rng.random() < 0.3 else 'at'} the {where}"
    opening = _OPENINGS[int(rng.integers(len(_OPENINGS)))]
    backdrop = _PLACES[int(rng.integers(len(_PLACES)))].format(scene.background)
    on = "" if rng.random() < 0.05 else f" {'over' if rng.random() < 0.2 else 'on'} a {backdrop}"
    looks = []
    if scene.time == "night" or rng.random() < 0.4:
        looks.append(_time(scene) if rng.random() < 0.7 else scene.time)
    if scene.line == "outlined" or rng.random() < 0.4:
        looks.append(scene.line)
    if scene.style != "plain":
        looks.append(scene.style)
    if rng.random() < 0.3:
        looks.reverse()
    thing = f"{opening} {size}{word(scene.color)} {word(scene.shape)}"
    body = f"{thing}{on}{at}" if rng.random() < 0.3 else f"{thing}{at}{on}"
    return ", ".join([body, *looks])


def _time(scene: Scene) -> str:
    return "at night" if scene.time == "night" else "by day"
