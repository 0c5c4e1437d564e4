"""The open-loop client's arithmetic, and both applications answering it over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from pathlib import Path

import pytest

from loadtests.apps import KINDS
from loadtests.open_loop import arrivals, percentile, send, serving


def test_arrivals_are_poisson_and_the_same_for_both() -> None:
    load = arrivals(20.0, 4000, seed=3)
    gaps = [b.due_s - a.due_s for a, b in itertools.pairwise(load)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1)  # exponential: mean = deviation
    assert load == arrivals(20.0, 4000, seed=3)


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.5) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_both_applications_answer(kind: str, lcm_checkpoint: Path, cache_dir: Path) -> None:
    load = arrivals(float("inf"), 12, seed=1)
    with serving(kind, "gpu_shaped", str(lcm_checkpoint), cache_dir) as service:
        latencies = asyncio.run(send(service.url, load))
    assert len(latencies) == len(load)
    assert min(latencies) > 0.016  # one step of 12 ms and one decode of 4 ms, asleep
