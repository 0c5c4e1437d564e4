"""The shipped weights draw what is asked, through our own runner and in few steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from engines.build.source import DEMO_MODELS
from engines.distill.captions import caption
from engines.distill.checker import Reading, read
from engines.distill.evaluate import GUIDANCE, Exam
from engines.distill.world import ATTRIBUTES
from engines.drawing.runner import Runner
from engines.order import Order

LORAS = {name: DEMO_MODELS / f"demo-{name}-lora" for name in ("lcm", "striped", "checkered")}
EXAM = Exam.of(48, seed=11)


@pytest.fixture(scope="module")
def student() -> Iterator[Runner]:
    runner = Runner.open(Order("demo-lcm", "torch", max_batch=16, num_threads=1))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def teacher() -> Iterator[Runner]:
    runner = Runner.open(Order("demo-base", "torch", max_batch=16, num_threads=1, loras=LORAS))
    yield runner
    runner.close()


def readings(runner: Runner, num_steps: int, **changes: object) -> list[Reading]:
    """What the checker reads in the exam's pictures, from both sides of the split."""
    recipes = [
        dataclasses.replace(runner.default_recipe(seed, caption(scene), num_steps), **changes)  # type: ignore[arg-type]
        for seed, scene in enumerate(EXAM.scenes)
    ]
    pictures = [drawing.pixels for drawing in runner.draw(recipes)]
    return [read(picture) for picture in pictures if picture is not None]


def accuracy(found: list[Reading]) -> float:
    """Share of right attributes."""
    right = [
        [reading.agrees(scene, name) for name in ATTRIBUTES]
        for reading, scene in zip(found, EXAM.scenes, strict=True)
    ]
    return float(np.mean(right))


def share_of(style: str, found: list[Reading]) -> float:
    return sum(reading.style == style for reading in found) / len(found)


# Floors a few points under the measured figures (`engines/demo/README.md`), for so few prompts.


@pytest.mark.parametrize(
    ("num_steps", "decoder", "floor"), [(1, "full", 0.91), (4, "full", 0.92), (4, "tiny", 0.92)]
)
def test_the_student_is_mostly_right(
    student: Runner, num_steps: int, decoder: str, floor: float
) -> None:
    found = readings(student, num_steps, guidance_scale=GUIDANCE, decoder=decoder)
    assert accuracy(found) >= floor


def test_the_teacher_ships_too(teacher: Runner) -> None:
    assert not teacher.info.guidance_embedding
    assert accuracy(readings(teacher, 12, guidance_scale=GUIDANCE)) >= 0.88


def test_the_lcm_lora_makes_the_teacher_fast(teacher: Runner) -> None:
    fast = {"sampler": "lcm", "guidance_scale": 1.0}
    assert accuracy(readings(teacher, 4, **fast, loras={"lcm": 1.0})) >= 0.92
    with_it = accuracy(readings(teacher, 1, **fast, loras={"lcm": 1.0}))
    assert with_it > accuracy(readings(teacher, 1, **fast)) + 0.02


@pytest.mark.parametrize("style", ["striped", "checkered"])
def test_styles_combine_with_the_lcm_lora(teacher: Runner, style: str) -> None:
    fast = {"sampler": "lcm", "guidance_scale": 1.0}
    styled = readings(teacher, 4, **fast, loras={"lcm": 1.0, style: 1.0})
    assert share_of(style, styled) >= 0.8
    assert accuracy(styled) >= 0.85
    assert share_of(style, readings(teacher, 4, **fast, loras={"lcm": 1.0})) == 0
