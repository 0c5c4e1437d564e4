"""`live --drop`: sessions opened and dropped at every phase, and what is left of them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter

from loadtests.abuse.attacks import PHASES, dropped_session
from loadtests.client import Client
from loadtests.report import Report
from loadtests.resources import HAPROXY, REPLICA, held_by
from loadtests.scrape import Scrape
from loadtests.serving import Service
from loadtests.traffic import SIZES

AT_A_TIME = 8
LEFT = ("fourstep_waiting_rows", "fourstep_running_rows", "fourstep_live_sessions")
EMPTY_WITHIN_S = 60.0
TURNS = 5  # of equal numbers, to see whether what is held grows


def drop_sessions(service: Service, count: int) -> Report:
    """So many, a few at a time, in turns; what the service holds before and after each."""
    Client(service.url).closed_loop(SIZES.asks(64, 1), AT_A_TIME)
    asyncio.run(_drop(service.url, 2 * AT_A_TIME))  # what a first session needs stays
    held, outcomes, rows = [held_by(service)], Counter[str](), []
    for size in _shares(count, TURNS):
        outcomes += asyncio.run(_drop(service.url, size))
        left = left_in(service)
        held.append(held_by(service))
        rows.append(left)
    report = Report("live-drop", f"{count} live sessions, dropped")
    report.text(
        f"{AT_A_TIME} at a time are opened and end without a goodbye: before a word, told of a "
        "prompt, with a frame drawn, with frames that others have superseded, and with pictures "
        "that nobody reads. What the service holds is looked at when the last row has left."
    )
    report.table(
        ["sessions so far", "rows and sessions left", "replica MiB", "descriptors", "threads",
         "HAProxy MiB", "descriptors"],
        [
            [
                done, "" if left is None else f"{sum(left.values()):g}",
                each[REPLICA].mib, each[REPLICA].fds, each[REPLICA].threads,
                each[HAPROXY].mib, each[HAPROXY].fds,
            ]
            for done, left, each in zip(
                itertools.accumulate([0, *_shares(count, TURNS)]), [None, *rows], held, strict=True
            )
        ],
    )  # fmt: skip
    report.text("Outcomes: " + ", ".join(f"{k} {n}" for k, n in sorted(outcomes.items())) + ".")
    report.data |= {
        "outcomes": outcomes, "left": rows,
        "held": [{kind: [h.mib, h.fds, h.threads] for kind, h in each.items()} for each in held],
    }  # fmt: skip
    return report


def _shares(count: int, parts: int) -> list[int]:
    bounds = [round(count * k / parts) for k in range(parts + 1)]
    return [b - a for a, b in itertools.pairwise(bounds)]


async def _drop(url: str, count: int) -> Counter[str]:
    outcomes = Counter[str]()
    phases = itertools.islice(itertools.cycle(PHASES), count)

    async def actor() -> None:
        for phase in phases:
            outcomes[await dropped_session(url, phase)] += 1

    await asyncio.gather(*(actor() for _ in range(AT_A_TIME)))
    return outcomes


def left_in(service: Service) -> dict[str, float]:
    """Rows and sessions once there are none, or as many as are there after a minute."""
    until = time.monotonic() + EMPTY_WITHIN_S
    while True:
        scrape = Scrape.of(service.url)
        left = {name: scrape.gauge(name) for name in LEFT}
        time.sleep(1.0)  # connections close a moment after their rows have left
        if sum(left.values()) == 0 or time.monotonic() > until:
            return left
