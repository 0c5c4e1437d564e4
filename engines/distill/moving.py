"""Things that move: the scenes of a clip's frames.

A clip is one scene painted several times, each time further to the right: the one way in which
things move here. Captions say nothing of it, so the text encoder of pictures will do.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from engines.distill.world import COLUMNS, SIZES, Scene

NUM_FRAMES = 8
TRAVEL = 0.25  # of the shorter side, from the first frame to the last


def frames_of(scene: Scene, num_frames: int = NUM_FRAMES) -> tuple[Scene, ...]:
    """The scene at each frame's time, evenly from the first to the last.

    The thing's place is in the middle of its way or, where the way would leave the picture, as near
    to the middle as that allows.
    """
    room = SIZES[scene.size] * scene.stretch + TRAVEL / 2  # from the border to the middle
    place = COLUMNS[scene.column]
    middle = min(max(place + scene.shift[0], room), 1 - room)
    return tuple(
        dataclasses.replace(scene, shift=(middle + TRAVEL * share - place, scene.shift[1]))
        for share in np.linspace(-0.5, 0.5, num_frames).tolist()
    )
