"""The shipped weights draw what is asked, through our own runner and in few steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engines.distill.captions import caption
from engines.distill.checker import read
from engines.distill.evaluate import GUIDANCE, Exam
from engines.distill.world import ATTRIBUTES
from engines.order import Order
from engines.runner import Runner

NUM_PROMPTS = 48


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner.open(Order("demo-lcm", backend="torch", max_batch=16, num_threads=1))


def accuracy(runner: Runner, num_steps: int) -> float:
    """Share of right attributes over prompts of both sides of the split."""
    exam = Exam.of(NUM_PROMPTS, seed=11)
    recipes = [
        dataclasses.replace(
            runner.default_recipe(seed, caption(scene), num_steps), guidance_scale=GUIDANCE
        )
        for seed, scene in enumerate(exam.scenes)
    ]
    right = []
    for drawing, scene in zip(runner.draw(recipes), exam.scenes, strict=True):
        assert drawing.pixels is not None
        reading = read(drawing.pixels)
        right.append([reading.agrees(scene, name) for name in ATTRIBUTES])
    return float(np.mean(right))


# Floors a few points under the measured figures (`engines/demo/README.md`), for so few prompts.


def test_one_step_is_mostly_right(runner: Runner) -> None:
    assert accuracy(runner, 1) >= 0.9


def test_four_steps_are_mostly_right(runner: Runner) -> None:
    assert accuracy(runner, 4) >= 0.88


def test_the_teacher_ships_too() -> None:
    teacher = Runner.open(Order("demo-base", backend="torch", max_batch=16, num_threads=1))
    assert not teacher.info.guidance_embedding
    assert accuracy(teacher, 12) >= 0.88
    teacher.close()
