"""Things that move: kinds of motion, the scenes of a clip's frames, and the words for them.

A clip is one scene painted several times, each time somewhere else or of another size. Knows
nothing of pixels or networks.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from engines.distill.captions import SYNONYMS, caption, paraphrase
from engines.distill.world import COLUMNS, ROWS, SHAPES, SIZES, Scene, draw_scene

NUM_FRAMES = 8
TRAVEL = 0.25  # of the shorter side, from the first frame to the last
GROWN = (0.65, 1.0)  # of the scene's size, at the beginning and at the end
STILL = "still"
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # right and down
MOTIONS = (STILL, *DIRECTIONS, "growing", "shrinking")
BACKWARDS = {"left": "right", "up": "down", "growing": "shrinking"}
BACKWARDS |= {after: before for before, after in BACKWARDS.items()} | {STILL: STILL}
_PHRASES: dict[str, tuple[str, ...]] = {
    **{way: (f"moving {way}", f"that moves {way}") for way in DIRECTIONS},
    "growing": ("growing", "that grows"),
    "shrinking": ("shrinking", "that shrinks"),
}
WORDS = ("moving", "moves", "that", "up", "down", "growing", "grows", "shrinking", "shrinks")


def frames_of(scene: Scene, motion: str, num_frames: int = NUM_FRAMES) -> tuple[Scene, ...]:
    """The scene at each frame's time, evenly from the first to the last.

    What moves goes `TRAVEL` far, with its place in the middle of the way or, where the way would
    leave the picture, as near to the middle as that allows. What grows ends at the scene's size.
    """
    if motion == STILL:
        return (scene,) * num_frames
    times = np.linspace(0, 1, num_frames).tolist()
    if motion in DIRECTIONS:
        return tuple(_moved(scene, motion, time - 0.5) for time in times)
    low, high = GROWN if motion == "growing" else reversed(GROWN)
    return tuple(
        dataclasses.replace(scene, stretch=scene.stretch * (low + (high - low) * time))
        for time in times
    )


def _moved(scene: Scene, motion: str, share: float) -> Scene:
    half = SIZES[scene.size] * scene.stretch
    places, shift = (COLUMNS[scene.column], ROWS[scene.row]), list(scene.shift)
    for axis, way in enumerate(DIRECTIONS[motion]):
        if way:
            room = half + TRAVEL / 2  # from the border to the middle of the way
            middle = min(max(places[axis] + shift[axis], room), 1 - room)
            shift[axis] = middle + way * TRAVEL * share - places[axis]
    return dataclasses.replace(scene, shift=(shift[0], shift[1]))


def moving_caption(scene: Scene, motion: str) -> str:
    """The canonical caption: the scene's, then how it moves; a still one's is the scene's alone."""
    return caption(scene) if motion == STILL else f"{caption(scene)}, {_PHRASES[motion][0]}"


def moving_paraphrase(scene: Scene, motion: str, rng: np.random.Generator) -> tuple[str, str]:
    """One of the clip's captions, and the same without its motion: at the end, or at the thing."""
    text = caption(scene) if rng.random() < 0.3 else paraphrase(scene, rng)
    if motion == STILL:
        return text, text
    phrase = _PHRASES[motion][int(rng.integers(len(_PHRASES[motion])))]
    if rng.random() < 0.5:
        comma = "," if rng.random() < 0.7 else ""
        return f"{text}{comma} {phrase}", text
    names = {*SHAPES, *(word for shape in SHAPES for word in SYNONYMS.get(shape, ()))}
    words = text.split()
    at = next(index for index, word in enumerate(words) if word.rstrip(",") in names)
    comma = "," if words[at].endswith(",") else ""
    words[at] = f"{words[at].rstrip(',')} {phrase}{comma}"
    return " ".join(words), text


def draw_motion(rng: np.random.Generator) -> str:
    """Any kind, all alike."""
    return MOTIONS[int(rng.integers(len(MOTIONS)))]


def draw_clip(rng: np.random.Generator, *, held_out: bool = False) -> tuple[Scene, str]:
    """A scene and how it moves."""
    return draw_scene(rng, held_out=held_out), draw_motion(rng)
