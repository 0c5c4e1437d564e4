"""The scheduler's own policy against request-level batching, in simulated time.

The product's `Scheduler` runs unchanged; engines are replaced by timing doubles, so the figures say
what the policy does and nothing about any machine. Arrivals are Poisson, steps drawn from 1, 2, 4
and 8, sizes from two; both systems see the same arrivals.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Annotated

import typer

from loadtests.plots import lines, name_axes, panels
from loadtests.report import RESULTS, OutOption, Report
from loadtests.simulated import SimulatedReplica, SimulatedRow
from loadtests.timing import CPU_SHAPED, GPU_SHAPED, PIXELS, TimingDouble
from loadtests.traffic import MIXED

BATCH = 8
LOADS = (0.5, 0.7, 0.85)
BATCH_WAIT_S = 0.01  # Ray Serve's own default for `batch_wait_timeout_s`
ENGINES = (CPU_SHAPED, GPU_SHAPED)


def arrivals(rate: float, count: int, seed: int) -> list[SimulatedRow]:
    """Poisson arrivals at ``rate`` requests a second."""
    rng = random.Random(seed)
    now, rows = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        rows.append(SimulatedRow(now, rng.choice(MIXED.steps), rng.choice(list(PIXELS))))
    return rows


def run_fourstep(rows: list[SimulatedRow], engine: TimingDouble) -> None:
    """By the product's scheduler; fills ``finished_at``."""
    SimulatedReplica(engine).run(rows)


def run_request_level(rows: list[SimulatedRow], engine: TimingDouble) -> None:
    """`@serve.batch` over the same engine: whole calls collected, one run per size.

    Kinder than a diffusers pipeline would be: rows of different step counts share the run, and a
    row costs nothing after its last step. All answers leave when the batch is done.
    """
    now, index = 0.0, 0
    while index < len(rows):
        now = max(now, rows[index].arrived_at)
        until = max(now, rows[index].arrived_at + BATCH_WAIT_S)
        end = index
        while end < len(rows) and end - index < BATCH and rows[end].arrived_at <= until:
            end += 1
        batch, index = rows[index:end], end
        if len(batch) < BATCH:
            now = until
        for size in sorted({row.size for row in batch}):
            rows_of_size = [row for row in batch if row.size == size]
            for step in range(max(row.num_steps for row in rows_of_size)):
                active = [size for row in rows_of_size if row.num_steps > step]
                now += engine.seconds(engine.step, active)
            now += engine.seconds(engine.decode, [size] * len(rows_of_size))
        for row in batch:
            row.finished_at = now


def percentiles(rows: list[SimulatedRow]) -> tuple[float, float, float]:
    """p50, p95 and p99 of the latency, in seconds."""
    latencies = sorted(row.finished_at - row.arrived_at for row in rows)
    return tuple(latencies[int(len(rows) * share)] for share in (0.5, 0.95, 0.99))  # type: ignore[return-value]


def capacity(
    run: Callable[[list[SimulatedRow], TimingDouble], None], engine: TimingDouble
) -> float:
    """Requests a second when everything has already arrived."""
    rows = arrivals(1e9, 2000, seed=1)
    run(rows, engine)
    return len(rows) / max(row.finished_at for row in rows)


def simulate(
    count: Annotated[int, typer.Option(min=100, help="Requests per run.")] = 4000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per cell, averaged.")] = 4,
    out: OutOption = RESULTS,
) -> None:
    """Latency of Fourstep's policy over request-level batching, per engine shape and load."""
    report = Report("simulate", "The policy against request-level batching, in simulated time")
    figure, panels_of = panels(len(ENGINES))
    rows = []
    for engine, panel in zip(ENGINES, panels_of, strict=True):
        ours, theirs = capacity(run_fourstep, engine), capacity(run_request_level, engine)
        found = []
        for load in LOADS:
            ratios = [ratio(engine, load * ours, count, seed) for seed in range(seeds)]
            found.append([statistics.fmean(column) for column in zip(*ratios, strict=True)])
            cells = [f"{value:.2f}×" for value in found[-1]]
            rows.append([engine.name, f"{load:.0%}", *cells, f"{load * ours / theirs:.0%}"])
        columns = zip(("p50", "p95", "p99"), zip(*found, strict=True), strict=True)
        lines(panel, {name: ([100 * load for load in LOADS], v) for name, v in columns})
        panel.axhline(1, color="#888888", linestyle="--", linewidth=1)
        name_axes(panel, engine.name, "load, % of Fourstep's capacity", "share of request-level's")
    header = ["engine", "load", "p50", "p95", "p99", "of request-level's own capacity"]
    report.table(header, rows)
    report.data["rows"] = rows
    report.figure("latency", figure, "Latency over request-level batching's, against load")
    report.write(out)


def ratio(engine: TimingDouble, rate: float, count: int, seed: int) -> tuple[float, float, float]:
    """Fourstep's p50, p95, p99 over request-level batching's, on the same arrivals."""
    ours, theirs = arrivals(rate, count, seed), arrivals(rate, count, seed)
    run_fourstep(ours, engine)
    run_request_level(theirs, engine)
    a, b = percentiles(ours), percentiles(theirs)
    return (a[0] / b[0], a[1] / b[1], a[2] / b[2])
