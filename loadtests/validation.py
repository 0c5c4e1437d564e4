"""The fleet simulation beside the real thing: one to three replicas on this machine.

The replicas sleep as a GPU of `timing.GPU_SHAPED` would compute, so three of them fit on two cores;
proxy, admission, scheduler and image encoding are real. The simulation gets what a bare runner's
calls take here, as a plan gets them from the engine table. Both meet the same requests at the same
times.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tqdm import tqdm

from loadtests import serving
from loadtests.bare import call_times
from loadtests.client import Client, Latencies, require_answers
from loadtests.fleet import Fleet, fixed
from loadtests.peers.sleeping import open_sleeping
from loadtests.report import Report
from loadtests.simulated import SimulatedRow
from loadtests.sizing import Machine, line_through
from loadtests.timing import GPU_SHAPED, TimingDouble
from loadtests.traffic import Profile, poisson, until

REPLICAS = (1, 2, 3)
LOAD = 0.5  # of what the replicas can do when saturated


def validate_fleet(
    report: Report, profile: Profile, model: str, cache_dir: Path, seconds: float
) -> None:
    """Add a table of simulated and measured percentiles to ``report``."""
    rows = []
    timing = _measured(model, cache_dir)
    capacity = Machine("double", timing, 0).saturated(profile)
    for count in tqdm(REPLICAS, desc="real replicas", unit="fleet"):
        rate = LOAD * count * capacity
        due_s = until(poisson(rate, seed=count), seconds)
        asks = profile.asks(len(due_s), seed=count)
        with serving.fourstep(model, cache_dir, replicas=count, gpu_shaped=True) as service:
            client = Client(service.url)
            client.closed_loop(profile.asks(16 * count, seed=0), 4 * count)
            answers = client.open_loop(asks, due_s)
        require_answers(answers, f"{count} replicas")
        real = Latencies(answer.latency_s for answer in answers)
        arrivals = (
            SimulatedRow(due, ask.num_steps, 128) for due, ask in zip(due_s, asks, strict=True)
        )
        simulated = Latencies(Fleet(timing, fixed(count)).run(arrivals).latencies_s)
        rows.append(
            [
                count, f"{rate:.1f}",
                *(f"{simulated.ms(p):.0f} / {real.ms(p):.0f}" for p in (50, 95)),
                *(f"{simulated.ms(p) / real.ms(p):.2f}×" for p in (50, 95)),
            ]
        )  # fmt: skip
    report.text("## Simulated and real replicas")
    header = ["replicas", "images/s due", "p50 ms: simulated / real", "p95 ms: simulated / real",
              "p50 ratio", "p95 ratio"]  # fmt: skip
    report.table(header, rows)
    report.data["validation"] = rows


def _measured(model: str, cache_dir: Path) -> TimingDouble:
    """The double's timing with what the runner itself adds to every call."""
    runner = open_sleeping(model, cache_dir)
    batches = [1, 2, 4, GPU_SHAPED.limits.max_batch]
    size_px = runner.info.default_width
    times = [call_times(runner, batch, size_px, seconds=0.2) for batch in batches]
    runner.close()
    step, decode = (
        line_through(batches, [ms / 1e3 for ms in column]) for column in zip(*times, strict=True)
    )
    return dataclasses.replace(GPU_SHAPED, step=step, decode=decode)
