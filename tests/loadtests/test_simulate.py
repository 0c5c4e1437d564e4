"""The simulation: both systems finish everything, and the policy's advantage holds."""

from __future__ import annotations

import pytest

from loadtests import live_simulated
from loadtests.clips import LOADS, PICTURE_STEPS, PROMISE, simulated
from loadtests.simulate import (
    CPU_SHAPED,
    ENGINES,
    GPU_SHAPED,
    TimingDouble,
    arrivals,
    capacity,
    ratio,
    run_fourstep,
    run_request_level,
)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_both_finish_everything_and_never_early(engine: TimingDouble) -> None:
    for run in (run_fourstep, run_request_level):
        rows = arrivals(5.0, 300, seed=3)
        run(rows, engine)
        for row in rows:
            alone = row.num_steps * engine.seconds(engine.step, [row.size])
            assert row.finished_at - row.arrived_at >= alone


@pytest.mark.parametrize(
    ("engine", "p50", "p95"), [(CPU_SHAPED, 0.65, 0.95), (GPU_SHAPED, 0.3, 0.3)]
)
def test_ahead_of_request_level_batching_at_70_percent(
    engine: TimingDouble, p50: float, p95: float
) -> None:
    rate = 0.7 * capacity(run_fourstep, engine)
    found = ratio(engine, rate, count=3000, seed=0)
    assert found[0] <= p50
    assert found[1] <= p95


@pytest.mark.parametrize("num_open", [1, 8])
def test_pictures_keep_their_pace_beside_clips(num_open: int) -> None:
    rate = LOADS[1] * GPU_SHAPED.images_per_s(PICTURE_STEPS)
    alone, beside = (simulated(rate, 3000, count, seed=1) for count in (0, num_open))
    assert beside.pictures_s[1] <= PROMISE * alone.pictures_s[1]
    assert beside.clips_per_s > 0.4  # they are not stopped


@pytest.mark.parametrize(("engine", "most"), [(CPU_SHAPED, 1.3), (GPU_SHAPED, 2.1)])
def test_the_api_keeps_its_pace_beside_live_sessions(engine: TimingDouble, most: float) -> None:
    """However many: more of them share what one would have."""
    alone, beside = (live_simulated.run(engine, 0.5, count, seconds=100) for count in (0, 16))
    assert beside.api_s[1] <= most * alone.api_s[1]
    assert beside.pictures_per_s > 9  # they are not stopped
