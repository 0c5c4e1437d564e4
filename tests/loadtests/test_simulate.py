"""The simulation: both systems finish everything, and the policy's advantage holds."""

from __future__ import annotations

import pytest

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
