"""Things that move: their frames, their words, and an exam that sees how they move."""

from __future__ import annotations

import numpy as np
import pytest

from engines.distill.captions import caption
from engines.distill.checker import read
from engines.distill.clips import ClipExam, score
from engines.distill.moving import (
    BACKWARDS,
    DIRECTIONS,
    MOTIONS,
    STILL,
    TRAVEL,
    WORDS,
    draw_clip,
    frames_of,
    moving_caption,
    moving_paraphrase,
)
from engines.distill.painter import box
from engines.distill.tokenizer import MAX_TOKENS, build_tokenizer
from engines.distill.world import draw_scene

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("motion", MOTIONS)
def test_frames_go_where_they_are_said_to(motion: str) -> None:
    for _ in range(50):
        scene = draw_scene(RNG)
        boxes = np.array([box(frame, 128, 128) for frame in frames_of(scene, motion)])
        first, last = boxes[0], boxes[-1]
        middles = (boxes[:, :2] + boxes[:, 2:]) / 2
        dx, dy = middles[-1] - middles[0]
        if motion in DIRECTIONS:
            assert (dx, dy) == pytest.approx(np.multiply(DIRECTIONS[motion], TRAVEL * 128))
        else:
            assert (dx, dy) == pytest.approx((0, 0))
        growth = (last[2] - last[0]) / (first[2] - first[0])
        grown = {"growing": 1 / 0.65, "shrinking": 0.65}.get(motion, 1)
        assert growth == pytest.approx(grown)
        steps = np.diff(boxes, axis=0)
        assert np.allclose(steps, steps[0])


def test_a_clip_run_backwards_is_another_kinds() -> None:
    scene = draw_scene(RNG)
    for motion, other in BACKWARDS.items():
        pairs = zip(frames_of(scene, motion)[::-1], frames_of(scene, other), strict=True)
        for one, two in pairs:
            assert box(one, 128, 128) == pytest.approx(box(two, 128, 128))


def test_the_tokenizer_of_pictures_says_the_same_of_what_it_knows() -> None:
    of_pictures, of_clips = build_tokenizer(), build_tokenizer(WORDS)
    for _ in range(200):
        scene, motion = draw_clip(RNG)
        moving, still = moving_paraphrase(scene, motion, RNG)
        assert of_pictures(still)["input_ids"] == of_clips(still)["input_ids"]
        ids = of_clips(moving)["input_ids"]
        assert len(ids) <= MAX_TOKENS
        assert len(ids) == 2 + len(moving.replace(",", " ,").split()), "each word is one token"
        assert (motion == STILL) == (moving == still)
        assert moving_caption(scene, motion).startswith(caption(scene))


def test_the_exam_sees_how_things_move() -> None:
    exam = ClipExam.of(7, seed=2)
    painted = exam.paint()
    told = score(exam, painted)
    assert (told.frames, told.whole, told.motion) == (1, 1, 1)
    assert told.way_px < 1
    assert told.jitter_px < 1.5
    backwards = score(exam, painted[:, ::-1])
    assert backwards.frames == 1
    assert backwards.motion == pytest.approx(1 / 7), "but for what stands still"
    assert backwards.way_px > 5
    blank = np.full_like(painted, 255)
    assert score(exam, blank).motion == 0
    assert read(blank[0, 0]).box is None
