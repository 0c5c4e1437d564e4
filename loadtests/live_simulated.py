"""Live sessions beside API load in simulated time: what the API loses by the policy alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from loadtests.report import Report
from loadtests.simulate import percentiles
from loadtests.simulated import SimulatedReplica, SimulatedRow
from loadtests.timing import CPU_SHAPED, GPU_SHAPED, TimingDouble
from loadtests.traffic import poisson, until
from service.batching.scheduler import Limits

API_STEPS, LIVE_STEPS, SIDE_PX = 4, 2, 128
LOADS, SESSIONS = (0.5, 0.8), (1, 4, 16)
WIDE = dataclasses.replace(
    GPU_SHAPED, name=f"{GPU_SHAPED.name}, batches of 16", limits=Limits(16, 8)
)
FPS = 20.0  # that a session sends; one is drawn at a time, and the newest follows it
SECONDS = 300.0


@dataclass(frozen=True)
class Run:
    """The API's latencies in seconds, p50, p95 and p99, and how the sessions fared beside it."""

    api_s: tuple[float, float, float]
    pictures_per_s: float = 0.0  # of all sessions
    frame_s: float = 0.0  # p95


def run(engine: TimingDouble, load: float, num_sessions: int, seconds: float = SECONDS) -> Run:
    """Poisson arrivals of API requests, and so many sessions beside them."""
    due = until(poisson(load * engine.images_per_s(API_STEPS), seed=1), seconds)
    api = [SimulatedRow(at, API_STEPS, SIDE_PX) for at in due]
    first = [_frame(session / FPS / num_sessions) for session in range(num_sessions)]
    frames = SimulatedReplica(engine).run(
        api, first, lambda done: _frame(max(done.arrived_at + 1 / FPS, done.finished_at))
    )
    return Run(percentiles(api), len(frames) / seconds, percentiles(frames)[1] if frames else 0.0)


def _frame(at: float) -> SimulatedRow:
    return SimulatedRow(at, LIVE_STEPS, SIDE_PX, live=True)


def report_simulated() -> Report:
    """A table over the doubles, loads of the API and numbers of sessions."""
    report = Report("live-simulated", "Live sessions beside the API, in simulated time")
    report.text(
        f"API requests of {API_STEPS} steps arrive at random, at a share of what the engine can "
        f"draw; each session sends {FPS:g} frames a second of {LIVE_STEPS} steps. The product's "
        "own scheduler over timing doubles; ratios are over the same arrivals without sessions."
    )
    rows: list[list[object]] = []
    for engine in (CPU_SHAPED, GPU_SHAPED, WIDE):
        for load in LOADS:
            alone = run(engine, load, 0).api_s
            for num_sessions in SESSIONS:
                beside = run(engine, load, num_sessions)
                ratios = [b / a for a, b in zip(alone, beside.api_s, strict=True)]
                report.data.setdefault("rows", []).append(
                    [engine.name, load, num_sessions, *ratios, beside.pictures_per_s]
                )
                cells = [f"{ratio:.2f}×" for ratio in ratios]
                live = [beside.pictures_per_s, 1e3 * beside.frame_s]
                rows.append([engine.name, f"{load:.0%}", num_sessions, *cells, *live])
    report.table(
        ["engine", "load of the API", "sessions", "API p50", "p95", "p99", "live pictures/s",
         "frame p95 ms"], rows,
    )  # fmt: skip
    return report
