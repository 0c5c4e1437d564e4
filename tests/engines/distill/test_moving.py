"""Things that move: their frames, the exam that sees how they move, and the shipped model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engines.build.source import DEMO_MODELS
from engines.distill.clips import MODEL, ClipExam, score
from engines.distill.evaluate import GUIDANCE
from engines.distill.moving import TRAVEL, frames_of
from engines.distill.painter import box
from engines.distill.world import draw_scene
from engines.drawing.runner import Runner
from engines.order import Order

MAX_BYTES = 6_000_000  # of what the model adds to those of pictures


def test_frames_go_to_the_right() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        boxes = np.array([box(frame, 128, 128) for frame in frames_of(draw_scene(rng))])
        steps = np.diff(boxes, axis=0)
        assert np.allclose(steps, steps[0])
        assert boxes[-1] - boxes[0] == pytest.approx([TRAVEL * 128, 0, TRAVEL * 128, 0])
        assert boxes[:, 0].min() > -1e-6
        assert boxes[:, 2].max() < 128 + 1e-6


def test_the_exam_sees_how_things_move() -> None:
    exam = ClipExam.of(4, seed=2)
    painted = exam.paint()
    told = score(exam, painted)
    assert (told.frames, told.whole, told.motion) == (1, 1, 1)
    assert told.way_px < 1
    assert told.jitter_px < 1.5
    backwards = score(exam, painted[:, ::-1])
    assert (backwards.frames, backwards.motion) == (1, 0)
    assert backwards.way_px > 5
    standing = score(exam, np.repeat(painted[:, 3:4], 8, axis=1))
    assert (standing.frames, standing.motion) == (1, 0)
    assert score(exam, np.full_like(painted, 255)).motion == 0


def test_the_shipped_model_draws_what_is_asked_and_moves_it() -> None:
    """By the engine, in four steps; floors are some points under the table's figures."""
    runner = Runner.open(Order(MODEL, "torch", max_batch=8, num_threads=1))
    exam = ClipExam.of(8, seed=5)
    recipes = [
        dataclasses.replace(runner.default_recipe(seed, prompt, 4), guidance_scale=GUIDANCE)
        for seed, prompt in enumerate(exam.prompts)
    ]
    clips = np.stack(
        [drawing.pixels for drawing in runner.draw(recipes) if drawing.pixels is not None]
    )
    runner.close()
    told = score(exam, clips)
    assert told.frames >= 0.85
    assert told.motion >= 0.75


def test_its_weights_are_small() -> None:
    """All but the adapter are those of `demo-lcm`, byte by byte."""
    own = 0
    for file in (DEMO_MODELS / MODEL).rglob("*"):
        kin = DEMO_MODELS / "demo-lcm" / file.relative_to(DEMO_MODELS / MODEL)
        if file.is_file() and not (kin.is_file() and kin.read_bytes() == file.read_bytes()):
            own += file.stat().st_size
    assert own < MAX_BYTES
