"""`plan`: how many machines of which kind, at what cost, with which autoscaling.

Two models: one replica's promise (the product's scheduler over the measured engine), and a fleet
through a day (`loadtests.fleet`). Both are checked: against `capacity`, and with ``--validate``
against one to three real replicas on this machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from tqdm import tqdm

from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests.client import Latencies
from loadtests.fleet import Autoscaling, Fleet, Outcome
from loadtests.plots import COLORS, name_axes, panels
from loadtests.report import RESULTS, OutOption, Report
from loadtests.simulated import SimulatedRow
from loadtests.sizing import Machine, rows_due
from loadtests.traffic import PROFILES, Profile, recorded_day, synthetic_day, varying
from loadtests.validation import validate_fleet

HISTORY_POINTS = 1500  # of a plot's line


@dataclasses.dataclass(frozen=True)
class Day:
    """Traffic as a picklable description: a recording, or the synthetic one."""

    peak: float
    length_s: float
    recording: Path | None = None

    def rows(self, profile: Profile) -> Iterator[SimulatedRow]:
        rate = synthetic_day(self.peak, self.length_s)
        peak, length_s = self.peak, self.length_s
        if self.recording:
            rate, peak, length_s = recorded_day(self.recording)
        return rows_due(varying(rate, peak, seed=1), profile, length_s)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A machine and an autoscaling configuration to try through the day."""

    machine: Machine
    config: Autoscaling

    @property
    def label(self) -> str:
        config = self.config
        if config.min_replicas == config.max_replicas:
            return f"{config.min_replicas} fixed"
        bounds = f"{config.min_replicas} to {config.max_replicas}"
        return f"{bounds}, target {config.target_ongoing_requests:g}"


def plan(
    machine: Annotated[
        list[str] | None,
        typer.Option(help="NAME=ENGINE.json@PRICE_PER_HOUR of a replica; repeat to compare."),
    ] = None,
    profile: Annotated[str, typer.Option(help="uniform or mixed.")] = "mixed",
    p95_ms: Annotated[float, typer.Option(min=1, help="The promise: 95 % within this.")] = 500,
    peak: Annotated[
        float, typer.Option(min=0, help="Images/s at the day's peak; 0: of 2.5 first machines.")
    ] = 0,
    hours: Annotated[float, typer.Option(min=0.01, max=168, help="Of the synthetic day.")] = 24,
    day: Annotated[
        Path | None, typer.Option(help="CSV of seconds,requests_per_second instead.")
    ] = None,
    cold_start_s: Annotated[
        float, typer.Option(min=0, help="From the decision to the first image.")
    ] = 20,
    upscale_delay_s: Annotated[float, typer.Option(min=0, help="Ray Serve's setting.")] = 30,
    overhead_ms: Annotated[
        float, typer.Option(min=0, help="Of an image besides engine calls, where cores are shared.")
    ] = 0,
    measured: Annotated[
        Path | None, typer.Option(help="JSON of `capacity` on the first machine, to check against.")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Run 1, 2 and 3 real replicas beside the simulation.")
    ] = False,
    validate_s: Annotated[float, typer.Option(min=2, help="Of each real run.")] = 20,
    model: Annotated[str, typer.Option(help="Of the real replicas.")] = "demo-lcm",
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """GPUs and money for a promise; bounds and target of autoscaling through a day."""
    if profile not in PROFILES or len(PROFILES[profile].sizes_px) > 1:
        raise typer.BadParameter(f"--profile is {profile!r}; a plan is for uniform or mixed")
    kind = PROFILES[profile]
    texts = machine or [f"this-machine={RESULTS / 'engine.json'}@0.10"]
    try:
        machines = [Machine.parse(text, kind, overhead_ms) for text in texts]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"--machine: {error}") from None
    promised = {each.name: each.promised(kind, p95_ms) for each in machines}
    first = machines[0]
    traffic = Day(peak or 2.5 * promised[first.name], 3600 * hours, day)
    report = Report("plan", f"What to buy for p95 ≤ {p95_ms:.0f} ms ({kind.name} requests)")
    _capacity(report, machines, kind, promised, traffic.peak)
    if measured:
        _check(report, first, kind, json.loads(measured.read_text()))
    defaults = Autoscaling(1, 1, upscale_delay_s=upscale_delay_s, cold_start_s=cold_start_s)
    _through_the_day(report, machines, kind, promised, traffic, defaults, p95_ms)
    if validate:
        validate_fleet(report, kind, model, cache_dir, validate_s)
    report.write(out)


def _capacity(
    report: Report, machines: list[Machine], profile: Profile, promised: dict[str, float],
    peak: float,
) -> None:  # fmt: skip
    rows: list[list[object]] = []
    for machine in machines:
        count = math.ceil(peak / promised[machine.name]) if promised[machine.name] else math.inf
        per_thousand = machine.price_per_hour / 3.6 / promised[machine.name] if count else 0.0
        rows.append(
            [
                machine.timing.name, f"{machine.saturated(profile):.1f}",
                f"{promised[machine.name]:.1f}", f"{peak:.1f}", count,
                f"{count * machine.price_per_hour:.2f}", f"{per_thousand:.4f}",
            ]
        )  # fmt: skip
    report.text("## Machines for the peak")
    header = ["machine", "images/s saturated", "within the promise", "peak to serve", "replicas",
              "cost an hour", "cost of 1000 images, all busy"]  # fmt: skip
    report.table(header, rows)
    report.data["machines"] = [
        {"name": m.name, "saturated": m.saturated(profile), "promised": promised[m.name],
         "price_per_hour": m.price_per_hour} for m in machines
    ]  # fmt: skip


def _check(report: Report, machine: Machine, profile: Profile, measured: dict[str, float]) -> None:
    """Both keep the promise that was measured, whatever the plan's own is."""
    saturated = machine.saturated(profile)
    promised = machine.promised(profile, measured["p95_ms"])
    rows = [
        ["saturated", f"{saturated:.2f}", f"{measured['saturated_images_per_s']:.2f}",
         f"{saturated / measured['saturated_images_per_s']:.2f}×"],
        [f"p95 ≤ {measured['p95_ms']:.0f} ms", f"{promised:.2f}",
         f"{measured['images_per_s']:.2f}",
         f"{promised / measured['images_per_s']:.2f}×" if measured["images_per_s"] else "–"],
    ]  # fmt: skip
    report.text("## Checked against a measured point")
    report.table(["images/s", "model", "measured by `capacity`", "model / measured"], rows)


def _through_the_day(
    report: Report, machines: list[Machine], profile: Profile, promised: dict[str, float],
    traffic: Day, defaults: Autoscaling, p95_ms: float,
) -> None:  # fmt: skip
    """Try fixed fleets and autoscaling; the cheapest that keeps the promise is the answer."""
    candidates = [
        Candidate(machine, config)
        for machine in machines
        if promised[machine.name]
        for config in _configs(math.ceil(traffic.peak / promised[machine.name]), defaults)
    ]
    with ProcessPoolExecutor() as pool:
        tasks = (candidates, [traffic] * len(candidates), [profile] * len(candidates))
        runs = tqdm(pool.map(_run, *tasks), total=len(candidates), desc="days", unit="day")
        outcomes = dict(zip(candidates, runs, strict=True))
    rows, best = [], None
    for candidate, outcome in outcomes.items():
        latencies = Latencies(outcome.latencies_s)
        cost = outcome.replica_s / 3600 * candidate.machine.price_per_hour
        kept = latencies.ms(95) <= p95_ms
        if kept and (best is None or cost < best[1]):
            best = (candidate, cost)
        rows.append(
            [
                candidate.machine.name, candidate.label, f"{latencies.ms(50):.0f}",
                f"{latencies.ms(95):.0f}", f"{latencies.ms(99):.0f}", "yes" if kept else "no",
                f"{outcome.replica_s / 3600:.1f}", f"{cost:.2f}",
                f"{1000 * cost / max(1, len(latencies)):.4f}",
            ]
        )  # fmt: skip
    report.text("## Through the day")
    header = ["machine", "replicas", "p50, ms", "p95, ms", "p99, ms", "promise kept",
              "replica-hours", "cost", "cost of 1000 images"]  # fmt: skip
    report.table(header, rows)
    if best is None:
        report.text("**None of these keeps the promise.** Raise the bounds, or start faster.")
    else:
        report.text(f"**Cheapest that keeps it: {best[0].machine.name}, {best[0].label}.**")
    report.data["days"] = rows
    shown = best[0] if best else candidates[-1]
    text = "Requests in flight and replicas through the day"
    report.figure("day", _day_plot(shown, outcomes[shown]), text)


def _configs(needed: int, defaults: Autoscaling) -> list[Autoscaling]:
    """A fixed fleet for the peak, and autoscaling between bounds with several targets."""
    found = [dataclasses.replace(defaults, min_replicas=needed, max_replicas=needed)]
    lows = sorted({1, max(1, needed // 2)})
    for low, target in itertools.product(lows, (1.0, 2.0, 4.0)):
        found.append(
            dataclasses.replace(
                defaults, min_replicas=low, max_replicas=needed + 1, target_ongoing_requests=target
            )
        )
    return found


def _run(candidate: Candidate, traffic: Day, profile: Profile) -> Outcome:
    return Fleet(candidate.machine.timing, candidate.config).run(traffic.rows(profile))


def _day_plot(candidate: Candidate, outcome: Outcome) -> Figure:
    figure, (left, right) = panels(2)
    every = max(1, len(outcome.history) // HISTORY_POINTS)
    times, counts, ongoing = zip(*outcome.history[::every], strict=True)
    hours = [time / 3600 for time in times]
    left.plot(hours, ongoing, color=COLORS[0], linewidth=0.8)
    left.set_ylim(bottom=0)
    name_axes(left, "Requests in flight", "hours", "requests")
    right.step(hours, counts, color=COLORS[1], where="post")
    right.set_ylim(bottom=0)
    name_axes(right, f"Replicas ({candidate.label})", "hours", "replicas running or starting")
    return figure
