"""Fleets in simulated time: one replica is the scheduler alone, autoscaling keeps its bounds."""

from __future__ import annotations

import itertools

import pytest

from loadtests.bare import Point
from loadtests.fleet import Autoscaling, Fleet, fixed
from loadtests.simulate import arrivals, run_fourstep
from loadtests.sizing import Machine, rows_at, rows_due, timing_of
from loadtests.timing import GPU_SHAPED
from loadtests.traffic import MIXED, poisson

GPU = Machine("double", GPU_SHAPED, price_per_hour=1.0)


def point(batch: int, step_ms: float, decode_ms: float) -> Point:
    seconds = (4 * step_ms + decode_ms) / 1e3
    return Point("torch", "fp16", batch, 128, 4, batch / seconds, step_ms, decode_ms, 1, 1, 1, 8, 4)


def test_a_fleet_of_one_is_the_scheduler_alone() -> None:
    """The event loop sees arrivals during a call when the scheduler's own drive sees them."""
    rows = arrivals(rate=30, count=1500, seed=2)
    run_fourstep(rows, GPU_SHAPED)
    outcome = Fleet(GPU_SHAPED, fixed(1)).run(arrivals(rate=30, count=1500, seed=2))
    alone = sorted(row.latency_s for row in rows)
    assert sorted(outcome.latencies_s) == pytest.approx(alone, abs=1e-9)


def test_autoscaling_follows_the_load_within_its_bounds() -> None:
    capacity = GPU.saturated(MIXED)
    config = Autoscaling(1, 3, upscale_delay_s=5, downscale_delay_s=20, cold_start_s=4)
    busy = rows_due(poisson(1.6 * capacity, seed=1), MIXED, end_s=120)
    quiet = ((time + 120, row) for time, row in zip(poisson(2, 2), itertools.repeat(None)))
    late = rows_due((time for time, _ in quiet), MIXED, end_s=300)
    outcome = Fleet(GPU_SHAPED, config).run(itertools.chain(busy, late))
    counts = [count for _, count, _ in outcome.history]
    assert set(counts) <= {1, 2, 3}
    assert max(counts) == 3
    assert counts[-1] == 1
    first_growth = next(time for time, count, _ in outcome.history if count > 1)
    assert first_growth >= 5  # not before the delay
    assert outcome.replica_s < 3 * 300


def test_no_replica_is_paid_for_while_nobody_asks_of_a_fleet_from_zero() -> None:
    config = Autoscaling(0, 1, upscale_delay_s=2, cold_start_s=10)
    outcome = Fleet(GPU_SHAPED, config).run(rows_at(1.0, MIXED, 5, seed=1))
    assert len(outcome.latencies_s) == 5  # those that came before there was a replica, too
    assert max(outcome.latencies_s) >= 12


def test_a_table_becomes_a_timing() -> None:
    points = [point(batch, 12 + 1.2 * batch, 4 + 4 * batch) for batch in (1, 2, 4, 8)]
    timing = timing_of("gpu", points, 128)
    assert timing.step == pytest.approx((0.012, 0.0012))
    assert timing.decode == pytest.approx((0.004, 0.004))
    assert (timing.limits.max_batch, timing.limits.max_decode_batch) == (8, 4)
    with pytest.raises(ValueError, match=r"no engine point of 512 px; the table has \[128\]"):
        timing_of("gpu", points, 512)
    with pytest.raises(ValueError, match="two batch sizes or more"):
        timing_of("gpu", points[:1], 128)


def test_the_promise_is_below_saturation_and_grows_with_it() -> None:
    strict, easy = (GPU.promised(MIXED, p95_ms) for p95_ms in (250, 2000))
    assert 0 < strict < easy <= GPU.saturated(MIXED)
