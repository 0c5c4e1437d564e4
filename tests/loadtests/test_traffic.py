"""Arrivals: Poisson, the same for everyone, and as many as the rate says."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from loadtests.traffic import MIXED, poisson, recorded_day, synthetic_day, until, varying


def test_arrivals_are_poisson_and_the_same_for_both() -> None:
    due_s = list(itertools.islice(poisson(20.0, seed=3), 4000))
    gaps = [b - a for a, b in itertools.pairwise(due_s)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1)  # exponential: mean = deviation
    assert due_s == list(itertools.islice(poisson(20.0, seed=3), 4000))
    assert MIXED.asks(50, seed=3) == MIXED.asks(50, seed=3)
    assert {ask.num_steps for ask in MIXED.asks(50, seed=3)} == set(MIXED.steps)


def test_a_varying_rate_has_its_integral_of_arrivals() -> None:
    rate = synthetic_day(peak=50, day_s=600)
    found = until(varying(rate, 50, seed=1), 600)
    assert len(found) == pytest.approx(sum(rate(second + 0.5) for second in range(600)), rel=0.05)
    at_night = sum(time < 60 for time in found)
    in_the_evening = sum(450 <= time < 510 for time in found)
    assert at_night < in_the_evening / 2


def test_a_recorded_day_is_read_in_steps(tmp_path: Path) -> None:
    path = tmp_path / "day.csv"
    path.write_text("seconds,requests_per_second\n0,2\n60,8\n120,0\n")
    rate, peak, length_s = recorded_day(path)
    assert [rate(time) for time in (0, 59, 60, 119)] == [2, 2, 8, 8]
    assert (peak, length_s) == (8, 120)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,2\n5\n", "line 2 is '5'; write seconds,requests_per_second"),
        ("0,2\n0,3\n", "line 2: times must grow"),
        ("0,2\n", "has 1 rates; a day needs two"),
    ],
)
def test_a_recording_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "day.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        recorded_day(path)
