"""What is learned of an engine's calls: exactly its costs, and as they are now."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.drawing.decoding import Decoding
from engines.drawing.drawing import Group
from service.batching.pace import TELLING, Pace
from service.batching.scheduler import Work, WorkKind

SMALL, LARGE = Group((4, 16, 16), ()), Group((4, 32, 32), ())
FULL, TINY = Decoding("full", SMALL.latents), Decoding("tiny", SMALL.latents)


def note(pace: Pace, kind: WorkKind, num_rows: int, seconds: float) -> None:
    """Of a call for small rows."""
    rows: tuple[Any, ...] = (None,) * num_rows
    pace.note(Work(kind, rows, FULL if kind is WorkKind.DECODE else SMALL), seconds)


@settings(deadline=None)
@given(
    fixed=st.floats(0, 0.1),
    per_row=st.floats(1e-4, 0.1),
    counts=st.lists(st.integers(1, 8), min_size=2, unique=True),
)
def test_the_fixed_part_of_a_decode_is_found(
    fixed: float, per_row: float, counts: list[int]
) -> None:
    pace = Pace()
    for num_rows in counts:
        note(pace, WorkKind.DECODE, num_rows, fixed + per_row * num_rows)
    assert pace.decode_fixed_s(FULL) == pytest.approx(fixed, abs=1e-9)
    for other in (TINY, Decoding("full", LARGE.latents)):
        assert pace.decode_fixed_s(other) == 0  # nothing is known of it


def test_one_size_of_decode_tells_nothing_of_its_fixed_part() -> None:
    pace = Pace()
    note(pace, WorkKind.DECODE, 4, 0.02)
    assert pace.decode_fixed_s(FULL) == 0


def test_a_batch_that_costs_less_than_its_half_is_bounded_by_what_was_seen() -> None:
    pace = Pace()
    note(pace, WorkKind.DECODE, 1, 0.03)
    note(pace, WorkKind.DECODE, 4, 0.02)
    assert pace.decode_fixed_s(FULL) == 0.03


def test_a_step_is_that_of_the_largest_batch_and_slow_ones_are_outliers() -> None:
    pace = Pace()
    assert pace.step_s(SMALL) == 0
    for seconds in (0.5, 0.02, 0.4):
        note(pace, WorkKind.DENOISE, 8, seconds)
    note(pace, WorkKind.DENOISE, 1, 0.013)
    assert pace.step_s(SMALL) == pytest.approx(0.02, rel=0.06)


def test_what_is_left_of_a_row_depends_on_how_many_there_are() -> None:
    pace = Pace()
    for kind, per_row in ((WorkKind.DENOISE, 0.01), (WorkKind.DECODE, 0.02)):
        for num_rows in (1, 2, 8) * TELLING:
            note(pace, kind, num_rows, per_row * num_rows)

    def least_s(num_steps_left: int, num_rows: int, group: Group = SMALL) -> float:
        drawing = SimpleNamespace(group=group, decoding=Decoding("full", group.latents))
        row: Any = SimpleNamespace(num_steps_left=num_steps_left, drawing=drawing)
        return pace.least_s(row, num_rows)

    assert least_s(4, 1) == pytest.approx(4 * 0.01 + 0.02)
    assert least_s(4, 3) == pytest.approx(4 * 0.02 + 0.04)  # no call of three was seen
    assert least_s(4, 50) == pytest.approx(4 * 0.08 + 0.16)
    assert least_s(0, 50) == pytest.approx(0.02)  # drawn already: every chance is given
    assert least_s(4, 50, LARGE) == 0  # nothing is known


def test_a_row_alone_is_never_judged_by_calls_of_many() -> None:
    """Else it would be given up, no call would be made, and nothing better ever be learned."""
    pace = Pace()
    for _ in range(TELLING):
        note(pace, WorkKind.DENOISE, 8, 10.0)
    drawing = SimpleNamespace(group=SMALL, decoding=FULL)
    row: Any = SimpleNamespace(num_steps_left=8, drawing=drawing)
    assert pace.least_s(row, num_rows=1) == 0


def test_nor_by_the_first_calls_of_a_size_which_are_slow() -> None:
    pace = Pace()
    drawing = SimpleNamespace(group=SMALL, decoding=FULL)
    row: Any = SimpleNamespace(num_steps_left=1000, drawing=drawing)
    for seconds in (0.1, *(0.002,) * (TELLING - 1)):
        assert pace.least_s(row, num_rows=1) == 0
        note(pace, WorkKind.DENOISE, 1, seconds)
    assert pace.least_s(row, num_rows=1) == pytest.approx(1000 * 0.002, rel=0.06)


def test_an_engine_that_became_slower_is_believed_in_the_end() -> None:
    pace = Pace()
    note(pace, WorkKind.DENOISE, 8, 0.02)
    for _ in range(40):
        note(pace, WorkKind.DENOISE, 8, 0.1)
    assert pace.step_s(SMALL) == 0.1
