"""What runs in processes of its own beside the ordinary clients: abuse, probes, scrapes.

So that no client waits for another one's Python. Everything here ends by itself.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import time
import urllib.parse
from collections import Counter

from loadtests.abuse.attacks import KINDS, PATIENCE_S, Kind, Target, scrape

PROBED = ("/-/healthz", "/readyz")
PROBE_EVERY_S = 0.1
PROBE_TIMEOUT_S = 5.0
Outcomes = dict[str, Counter[str]]  # by kind: how many acts came to which end


def abuse(url: str, seconds: float, seed: int) -> Outcomes:
    """All kinds side by side; what is under way when the time is up is dropped."""
    return asyncio.run(_abuse(Target.of(url, seed), KINDS, seconds))


def scrapes(url: str, at_a_time: int, seconds: float) -> Outcomes:
    """Ask for `/metrics`, each again when it was told."""
    target = Target.of(url, 1)
    return asyncio.run(_abuse(target, {"scrapes": Kind(scrape, at_a_time, 0.0)}, seconds))


async def _abuse(target: Target, kinds: dict[str, Kind], seconds: float) -> Outcomes:
    until = asyncio.get_running_loop().time() + seconds
    outcomes: Outcomes = {name: Counter() for name in kinds}

    async def actor(name: str, kind: Kind) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < until and outcomes[name].total() < kind.most:
            try:
                async with asyncio.timeout_at(min(until, loop.time() + PATIENCE_S)):
                    outcomes[name][await kind.act(target)] += 1
            except TimeoutError:
                over = loop.time() >= until
                outcomes[name]["open at the end" if over else f"open for {PATIENCE_S:g} s"] += 1
            except OSError as error:
                outcomes[name][type(error).__name__] += 1
            await asyncio.sleep(kind.pause_s)

    async with asyncio.TaskGroup() as group:
        for name, kind in kinds.items():
            for _ in range(kind.at_a_time):
                group.create_task(actor(name, kind))
    return outcomes


def probe(url: str, seconds: float) -> tuple[dict[str, list[float]], int]:
    """`PROBED` in turns, on a connection of its own each time.

    Returns the seconds of each, and how many of them were not answered with 200.
    """
    address, until = urllib.parse.urlsplit(url).netloc, time.monotonic() + seconds
    took_s: dict[str, list[float]] = {path: [] for path in PROBED}
    num_failed = 0
    for path in itertools.cycle(PROBED):
        if (begun := time.monotonic()) >= until:
            break
        connection = http.client.HTTPConnection(address, timeout=PROBE_TIMEOUT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            num_failed += answer.status != 200
        except (OSError, http.client.HTTPException):
            num_failed += 1
        finally:
            connection.close()
        took_s[path].append(time.monotonic() - begun)
        time.sleep(max(0.0, PROBE_EVERY_S - took_s[path][-1]))
    return took_s, num_failed
