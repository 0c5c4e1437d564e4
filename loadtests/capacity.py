"""`capacity`: the highest rate of Poisson arrivals at which a service keeps a promise on latency.

A closed loop finds where to look, bisection finds the rate, and a few lower rates fill the plots.
Latency counts from the time a request was due, so a queue cannot hide.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from tqdm import tqdm

from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests import serving
from loadtests.client import (
    AllowHostOption,
    Answer,
    Client,
    UrlOption,
    check_url,
    summarise,
)
from loadtests.plots import lines, name_axes, panels, stacked
from loadtests.report import RESULTS, OutOption, Report
from loadtests.scrape import Scrape
from loadtests.traffic import PROFILES, Profile, poisson, until

MAX_ERROR_SHARE = 0.001
PRECISION = 0.05  # bisection stops when the bracket is this narrow
LOWER_LOADS = (0.25, 0.5, 0.75)  # of the rate found, for the plots
STAGES = ("queue", "encode_text", "denoise", "decode", "image_encode")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One rate, held for a while."""

    rate: float
    met: bool
    summary: dict[str, float]
    stages_ms: dict[str, float]  # means over the answers
    batch_rows: float  # mean of the denoise calls
    step_ms: float  # mean of the denoise calls


class Trials:
    """Runs a rate against a service and keeps what came of it."""

    def __init__(self, url: str, profile: Profile, p95_ms: float, seconds: float, bar: Any) -> None:
        self._url, self._profile = url, profile
        self._p95_ms, self._seconds, self._bar = p95_ms, seconds, bar
        self._client = Client(url)
        self.done: list[Trial] = []

    def saturation(self) -> float:
        """Images a second with 32 clients in a closed loop: near what can be promised at most."""
        asks = self._profile.asks(10_000, seed=0)
        self._client.closed_loop(asks[:32], 8)  # connections, caches
        return summarise(self._client.closed_loop(asks, 32, self._seconds / 2))["images_per_s"]

    def run(self, rate: float) -> Trial:
        self._bar.set_description(f"{rate:.2f}/s")
        seed = len(self.done) + 1
        due_s = until(poisson(rate, seed), self._seconds) or [0.0]
        asks = self._profile.asks(len(due_s), seed)
        before = Scrape.of(self._url)
        answers = self._client.open_loop(asks, due_s)
        during = Scrape.of(self._url).since(before)
        summary = summarise(answers)
        met = summary["p95_ms"] <= self._p95_ms and summary["error_share"] < MAX_ERROR_SHARE
        trial = Trial(
            rate, met, summary, _stages(answers),
            during.mean("fourstep_batch_rows", stage="denoise"),
            1e3 * during.mean("fourstep_denoise_step_seconds"),
        )  # fmt: skip
        self.done.append(trial)
        self._bar.update()
        return trial

    def bisect(self, low: float, high: float, num_trials: int) -> float:
        """The highest rate found to keep the promise; 0 if none did. ``high`` is taken to fail."""
        for _ in range(num_trials):
            if high - low <= PRECISION * high:
                break
            middle = (low + high) / 2
            if self.run(middle).met:
                low = middle
            else:
                high = middle
        return low


def _stages(answers: list[Answer]) -> dict[str, float]:
    """Mean milliseconds of each stage, and of what no stage accounts for."""
    timed = [answer for answer in answers if answer.timings]
    if not timed:
        return {}
    means = {name: statistics.fmean(a.timings.get(name, 0.0) for a in timed) for name in STAGES}
    total = statistics.fmean(a.timings.get("total", 0.0) for a in timed)
    means["between calls"] = max(0.0, total - sum(means.values()))
    means["HTTP"] = max(0.0, 1e3 * statistics.fmean(a.latency_s for a in timed) - total)
    return {name.replace("_", " "): round(value, 3) for name, value in means.items()}


def capacity(
    url: UrlOption = "",
    allow_host: AllowHostOption = None,
    p95_ms: Annotated[float, typer.Option(min=1, help="The promise: 95 % within this.")] = 500,
    profile: Annotated[str, typer.Option(help="uniform, mixed or sizes.")] = "mixed",
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Of each rate.")] = 30,
    trials: Annotated[int, typer.Option(min=1, max=20, help="Rates tried in bisection.")] = 7,
    gpu_shaped: Annotated[
        bool, typer.Option("--gpu-shaped", help="Start it over an engine that sleeps as a GPU.")
    ] = False,
    model: Annotated[str, typer.Option(help="Of the service started here.")] = "demo-lcm",
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """The highest Poisson rate with p95 within --p95-ms and fewer than 0.1 % errors."""
    if profile not in PROFILES:
        raise typer.BadParameter(f"--profile is {profile!r}; known are {', '.join(PROFILES)}")
    with (
        started_or_named(url, allow_host, model, cache_dir, gpu_shaped=gpu_shaped) as base,
        tqdm(total=trials + len(LOWER_LOADS), unit="rate") as bar,
    ):
        runs = Trials(base, PROFILES[profile], p95_ms, seconds, bar)
        saturated = runs.saturation()
        found = runs.bisect(0.0, 1.05 * saturated, trials)
        for load in LOWER_LOADS:
            runs.run(load * (found or saturated))
    _write(runs.done, found, saturated, p95_ms, PROFILES[profile], gpu_shaped, out)


@contextlib.contextmanager
def started_or_named(
    url: str, hosts: list[str] | None, model: str, cache_dir: Path, *, gpu_shaped: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:  # fmt: skip
    """The base URL of a named service, or of one that runs here meanwhile."""
    if url:
        yield check_url(url, hosts or ())
        return
    started = serving.fourstep(model, cache_dir, gpu_shaped=gpu_shaped, environment=environment)
    with started as service:
        yield service.url


def _write(
    done: list[Trial], found: float, saturated: float, p95_ms: float, profile: Profile,
    gpu_shaped: bool, out: Path,
) -> None:  # fmt: skip
    done = sorted(done, key=lambda trial: trial.rate)
    report = Report("capacity" + ("-gpu-shaped" if gpu_shaped else ""), "Capacity under a promise")
    report.data |= {
        "profile": profile.name, "p95_ms": p95_ms, "images_per_s": found,
        "saturated_images_per_s": saturated, "trials": [dataclasses.asdict(t) for t in done],
    }  # fmt: skip
    report.text(
        f"**{found:.2f} images/s** keep p95 within {p95_ms:.0f} ms with fewer than "
        f"{MAX_ERROR_SHARE:.1%} errors ({profile.name}: {', '.join(map(str, profile.steps))} "
        f"steps, {found / saturated:.0%} of the {saturated:.2f} images/s at saturation)."
    )
    header = ["images/s due", "promise kept", "p50, ms", "p95, ms", "p99, ms", "first byte p50, ms",
              "rows a denoise call", "denoise call, ms", "errors"]  # fmt: skip
    report.table(header, [_row(trial) for trial in done])
    text = "Latency percentiles against the rate of arrivals"
    report.figure("latency", _latency_plot(done, found, p95_ms), text)
    text = "Rows of a denoise call and its time against the rate of arrivals"
    report.figure("batch", _batch_plot(done), text)
    if any(trial.stages_ms for trial in done):
        report.figure("stages", _stages_plot(done), "Mean time of each stage at each rate")
    report.write(out)


def _row(trial: Trial) -> list[object]:
    found = trial.summary
    return [
        f"{trial.rate:.2f}", "yes" if trial.met else "no",
        *(f"{found[f'p{p}_ms']:.0f}" for p in (50, 95, 99)), f"{found['first_byte_p50_ms']:.0f}",
        f"{trial.batch_rows:.2f}", f"{trial.step_ms:.1f}", f"{found['error_share']:.2%}",
    ]  # fmt: skip


def _latency_plot(done: list[Trial], found: float, p95_ms: float) -> Figure:
    figure, (panel,) = panels()
    rates = [trial.rate for trial in done]
    lines(panel, {f"p{p}": (rates, [t.summary[f"p{p}_ms"] for t in done]) for p in (50, 95, 99)})
    # A rate beyond capacity may last ten times as long; the promise is what is to be seen.
    panel.set_ylim(0, min(panel.get_ylim()[1], 4 * p95_ms))
    panel.axhline(p95_ms, color="#888888", linestyle="--", linewidth=1)
    panel.annotate(
        f"promise: p95 ≤ {p95_ms:.0f} ms, kept up to {found:.1f} images/s", (rates[0], p95_ms),
        xytext=(0, 4), textcoords="offset points", color="#555555", fontsize=9,
    )  # fmt: skip
    name_axes(panel, "Latency against load", "images/s due (Poisson)", "ms from due to answered")
    return figure


def _batch_plot(done: list[Trial]) -> Figure:
    figure, (left, right) = panels(2)
    rates = [trial.rate for trial in done]
    left.plot(rates, [trial.batch_rows for trial in done], marker="o", color="#0072B2")
    left.set_ylim(bottom=0)
    name_axes(left, "What the policy chose", "images/s due", "rows in a denoise call, mean")
    right.plot(rates, [trial.step_ms for trial in done], marker="o", color="#0072B2")
    right.set_ylim(bottom=0)
    name_axes(right, "What a call then took", "images/s due", "ms of a denoise call, mean")
    return figure


def _stages_plot(done: list[Trial]) -> Figure:
    """Of the rates that kept the promise; the others are queue and nothing else."""
    shown = [trial for trial in done if trial.met] or done[:1]
    figure, (panel,) = panels(height=1.2 + 0.5 * len(shown), width=8)
    parts = {name: [trial.stages_ms[name] for trial in shown] for name in shown[0].stages_ms}
    stacked(panel, [f"{trial.rate:.1f}/s" for trial in shown], parts)
    name_axes(panel, "Where a request's time goes", "ms, mean", "")
    return figure
