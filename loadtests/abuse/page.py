"""`soak --abuse`: a service abused beside ordinary load; what it held, and what others noticed."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from loadtests.abuse.attacks import ABUSER, KINDS
from loadtests.abuse.beside import PROBED, Outcomes, abuse, probe, scrapes
from loadtests.abuse.sessions import left_in
from loadtests.client import Answer, Client, Latencies
from loadtests.plots import COLORS, name_axes, panels
from loadtests.report import Report
from loadtests.resources import HAPROXY, REPLICA, Held, Watch, held_by, quarters
from loadtests.serving import Service
from loadtests.traffic import SIZES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENTS = 4  # ordinary ones, in a closed loop
MANY_CLIENTS = 16  # that fill the service, while others scrape
SCRAPERS = 16
SCRAPE_ROUNDS = 4
MAX_ASKS = 50_000
SETTLE_S = 45.0  # at most: longer than anything that an abuser left open may last
ABOUT = (
    f"Ordinary clients ({CLIENTS}, in a closed loop, 1 to 8 steps) and probes (on the port for "
    f"them alone, ten a second, in turns `{PROBED[0]}`, which Kubernetes asks and HAProxy answers "
    f"by its own checks, and `{PROBED[1]}`, which a replica answers) beside one abuser's address, "
    f"{ABUSER}, which never sends slower than it is let. Clients, probes and abusers share the "
    "cores with the service."
)
# As the product has it: the other commands let everything wait.
OWN_BOUNDS = {"FOURSTEP_MAX_WAITING": "256"}


@dataclass
class Run:
    """Of ordinary clients and of probes, for a while."""

    answers: list[Answer]
    probes: dict[str, Latencies]
    num_failed_probes: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        return sum(answer.ok for answer in self.answers) / self.seconds

    def told(self) -> dict[str, Any]:
        late = Latencies(answer.latency_s for answer in self.answers if answer.ok)
        return {
            "requests": len(self.answers),
            "statuses": Counter(str(answer.status or "no answer") for answer in self.answers),
            "images_per_s": self.images_per_s, "p50_ms": late.ms(50), "p95_ms": late.ms(95),
            "probes": sum(map(len, self.probes.values())), "failed_probes": self.num_failed_probes,
            **{f"p99_ms of {path}": probes.ms(99) for path, probes in self.probes.items()},
        }  # fmt: skip


@dataclass
class Abused:
    """What one service went through."""

    fresh: dict[str, Held]
    after: dict[str, Held]
    watch: Watch
    alone: Run
    beside: Run
    again: Run  # when it was over
    outcomes: Outcomes
    left: dict[str, float]
    load: float  # processes that ran or wanted to, before any abuse: more than cores are others'
    scraped: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def scraped_ratio(self) -> float:
        """Images a second while sixteen scrape, over those of the turns between: a median."""
        return statistics.median(hammered / alone for alone, hammered, _ in self.scraped)


def told(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))


def maltreat(service: Service, seconds: float, seed: int) -> Abused:
    """Abuse a running service for so long; everything else lasts in proportion."""
    load, client = os.getloadavg()[0], Client(service.url)
    client.closed_loop(SIZES.asks(64, seed), MANY_CLIENTS)
    with ProcessPoolExecutor(2, get_context("spawn")) as others:
        list(others.map(time.sleep, [0.01, 0.01]))  # they are there
        alone = _run(service, others, max(1.0, seconds / 20), seed)
        scraped = _scraped(service, others, max(0.3, seconds / 60))
        fresh = held_by(service)
        with Watch(service) as watch:
            abused: Future[Outcomes] = others.submit(abuse, service.url, seconds, seed)
            beside = _run(service, others, seconds, seed)
            outcomes = abused.result()
            after = _settled(service, min(SETTLE_S, max(2.0, seconds / 5)))
        again = _run(service, others, max(1.0, seconds / 20), seed)
    left = left_in(service)
    return Abused(fresh, after, watch, alone, beside, again, outcomes, left, load, scraped)


def _run(service: Service, others: ProcessPoolExecutor, seconds: float, seed: int) -> Run:
    """Ordinary clients and probes; both processes of ``others`` may be at work already."""
    probing = others.submit(probe, service.probes, seconds)
    answers = Client(service.url).closed_loop(SIZES.asks(MAX_ASKS, seed), CLIENTS, seconds)
    took_s, num_failed = probing.result()
    return Run(
        answers, {path: Latencies(each) for path, each in took_s.items()}, num_failed, seconds
    )


def _scraped(
    service: Service, others: ProcessPoolExecutor, seconds: float
) -> list[tuple[float, float, float]]:
    """In turns: images a second, the same while sixteen scrape, scrapes answered a second."""
    rounds = []
    for seed in range(SCRAPE_ROUNDS):
        asks = SIZES.asks(MAX_ASKS, seed)
        client = Client(service.url)
        alone = client.closed_loop(asks, MANY_CLIENTS, seconds)
        scraping = others.submit(scrapes, service.url, SCRAPERS, seconds)
        hammered = client.closed_loop(asks, MANY_CLIENTS, seconds)
        (counts,) = scraping.result().values()
        rates = (sum(answer.ok for answer in each) / seconds for each in (alone, hammered))
        rounds.append((*rates, counts["200"] / seconds))
    return [(alone, hammered, scrapes_per_s) for alone, hammered, scrapes_per_s in rounds]


def _settled(service: Service, seconds: float) -> dict[str, Held]:
    """What is held so many seconds later."""
    time.sleep(seconds)
    return held_by(service)


def page(found: Abused, seconds: float) -> Report:
    report = Report("soak-abuse", f"{seconds:.0f} seconds of abuse beside ordinary load")
    report.text(
        f"{ABOUT} Before the first request the machine's load was {found.load:.1f}, on "
        f"{os.cpu_count()} cores: where that is more than they are, other work had much of them, "
        "and times are theirs as much as the service's; compare them with those `alone`."
    )
    runs = {
        "alone": found.alone.told(),
        "beside abuse": found.beside.told(),
        "after it": found.again.told(),
    }
    report.table(
        ["", "requests", "outcomes", "images/s", "p50, ms", "p95, ms", "probes", "failed",
         *(f"p99 of `{path}`, ms" for path in PROBED)],
        [
            [name, *(told(cell) if isinstance(cell, Counter) else cell for cell in run.values())]
            for name, run in runs.items()
        ],
    )  # fmt: skip
    report.table(
        ["", "MiB before", "in each quarter", "most", "after", "after / before",
         "descriptors before, most, after", "threads before, most, after"],
        [_held(found, kind) for kind in (REPLICA, HAPROXY) if kind in found.fresh],
    )  # fmt: skip
    rows = ", ".join(f"`{name}` {value:g}" for name, value in found.left.items())
    report.text(
        f"When it was over: {rows}. MiB are anonymous memory, sampled once a second; `after` is "
        f"some {SETTLE_S:.0f} s after the last act, or a fifth of a shorter run."
    )
    report.table(
        ["abuse", "at a time", "acts", "outcomes"],
        [
            [name, KINDS[name].at_a_time, counts.total(), told(counts)]
            for name, counts in found.outcomes.items()
        ],
    )
    report.text(
        f"With {SCRAPERS} asking for `/metrics`, each again when it was told, {MANY_CLIENTS} "
        f"clients got **{found.scraped_ratio:.2f}×** the images of the turns between (median)."
    )
    report.table(["images/s", "while they scrape", "scrapes/s"], found.scraped)
    report.figure("held", _plot(found), "Memory, file descriptors and threads over time")
    report.data |= {
        "alone": runs["alone"], "beside": runs["beside abuse"], "again": runs["after it"],
        "outcomes": found.outcomes, "left": found.left, "load": found.load,
        "scraped": found.scraped,
        "held": {kind: _held(found, kind) for kind in found.fresh},
        "mib": {kind: [round(mib, 1) for mib in found.watch.mib(kind)] for kind in found.fresh},
    }  # fmt: skip
    return report


def _held(found: Abused, kind: str) -> list[object]:
    series = [sample[kind] for sample in found.watch.samples]
    before, after = found.fresh[kind], found.after[kind]
    most = Held(
        max(held.mib for held in series),
        max(held.fds for held in series),
        max(held.threads for held in series),
    )
    medians = ", ".join(f"{mib:.0f}" for mib in quarters(found.watch.mib(kind)))
    return [
        kind, before.mib, medians, most.mib, after.mib, f"{after.mib / before.mib:.2f}×",
        f"{before.fds}, {most.fds}, {after.fds}",
        f"{before.threads}, {most.threads}, {after.threads}",
    ]  # fmt: skip


def _plot(found: Abused) -> Figure:
    figure, axes = panels(3, width=4.6)
    values: Sequence[tuple[str, str]] = (
        ("mib", "MiB (anonymous memory)"), ("fds", "file descriptors"), ("threads", "threads"),
    )  # fmt: skip
    for panel, (name, label) in zip(axes, values, strict=True):
        for color, kind in zip(COLORS, found.fresh, strict=False):
            series = [getattr(sample[kind], name) for sample in found.watch.samples]
            panel.plot(found.watch.at_s, series, color=color, label=kind)
        panel.set_ylim(bottom=0)
        name_axes(panel, label, "seconds", "")
    axes[0].legend(frameon=False)
    return figure
