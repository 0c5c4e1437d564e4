"""Traffic as from many independent users, and an application to receive it.

Open loop: requests leave at their Poisson times whatever the answers do, and latency counts from
the time a request was due.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from loadtests.simulate import PIXELS, STEPS

START_TIMEOUT_S = 240.0
REQUEST_TIMEOUT_S = 300.0
PATH = "/v1/images/generations"


@dataclass(frozen=True)
class Service:
    """An application that runs in processes of its own; ``pid`` is their ancestor's."""

    url: str
    pid: int


@dataclass(frozen=True)
class Arrival:
    """One request: when it is due, in seconds from the start, and what it asks."""

    due_s: float
    seed: int
    num_steps: int
    size: int

    def body(self) -> dict[str, object]:
        return {
            "prompt": "a large red star at the center on a yellow background, by day, flat",
            "seed": self.seed,
            "num_inference_steps": self.num_steps,
            "size": f"{self.size}x{self.size}",
        }


def arrivals(rate: float, count: int, seed: int) -> list[Arrival]:
    """Poisson arrivals at ``rate`` requests a second; an infinite rate has all due at once."""
    rng = random.Random(seed)
    due_s, found = 0.0, []
    for index in range(count):
        due_s += rng.expovariate(rate) if rate != float("inf") else 0.0
        found.append(Arrival(due_s, index, rng.choice(STEPS), rng.choice(list(PIXELS))))
    return found


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = math.ceil(share * len(ordered) - 1e-9)  # 0.95 * 20 is a little above 19 in binary
    return ordered[max(0, rank - 1)]


async def send(url: str, load: list[Arrival], max_open: int = 10_000) -> list[float]:
    """Send every arrival when it is due; returns latencies in seconds, from due to answered.

    Raises:
        httpx.HTTPStatusError: an answer that is not 200; a benchmark with failures is none.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    gate = asyncio.Semaphore(max_open)
    async with httpx.AsyncClient(
        base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits, headers={"accept": "image/png"}
    ) as client:
        begun = time.perf_counter()

        async def one(arrival: Arrival) -> float:
            await asyncio.sleep(arrival.due_s - (time.perf_counter() - begun))
            async with gate:
                answer = await client.post(PATH, json=arrival.body())
            answer.raise_for_status()
            return time.perf_counter() - begun - arrival.due_s

        return list(await asyncio.gather(*(one(arrival) for arrival in load)))


@contextlib.contextmanager
def serving(kind: str, engine: str, model: str, cache_dir: Path) -> Iterator[Service]:
    """One application of `loadtests.apps` in processes of its own; yields its URL, ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "loadtests.apps"]
    command += [kind, engine, model, str(cache_dir), str(port)]
    root = str(Path(__file__).parents[1])  # Ray's workers import this package from there
    environment = {**os.environ, "PYTHONPATH": root, "FOURSTEP_MAX_WAITING": "10000"}
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, f"{url}/readyz")
        yield Service(url, process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            error = process.stderr.read().decode() if process.stderr else ""
            raise RuntimeError(f"the application ended before it served: {error[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the application does not answer within {START_TIMEOUT_S:.0f} s")
