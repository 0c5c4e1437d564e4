"""Mixed load over HTTP: the product against request-level batching, in one run on one machine.

Open loop: requests leave at their Poisson times whatever the answers do, and latency counts from
the time a request was due. Each application runs alone; both meet the same arrivals.
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
from typing import Annotated

import httpx
import typer

from loadtests.simulate import PIXELS, STEPS

LOADS = (0.5, 0.7, 0.85)
START_TIMEOUT_S = 240.0
REQUEST_TIMEOUT_S = 300.0
PATH = "/v1/images/generations"


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
def serving(kind: str, engine: str, model: str, cache_dir: Path) -> Iterator[str]:
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
        yield url
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


def mixed(
    engine: Annotated[str, typer.Option(help="cpu, or gpu_shaped (a timing double).")] = "cpu",
    model: Annotated[str, typer.Option(help="The model both serve.")] = "demo-lcm",
    count: Annotated[int, typer.Option(min=10, max=5000, help="Requests per load.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 1,
    cache_dir: Annotated[Path, typer.Option(envvar="FOURSTEP_CACHE_DIR")] = Path(
        "~/.cache/fourstep"
    ),
) -> None:
    """Latency at 50, 70 and 85 % of the product's capacity, over request-level batching's."""
    from loadtests.apps import ENGINES, KINDS

    if engine not in ENGINES:
        raise typer.BadParameter(f"--engine is {engine!r}; use {' or '.join(ENGINES)}")
    latencies: dict[tuple[str, float], list[float]] = {}
    capacity: dict[str, float] = {}
    for kind in KINDS:
        with serving(kind, engine, model, cache_dir.expanduser()) as url:
            asyncio.run(send(url, arrivals(float("inf"), 16, seed + 1)))  # connections, caches
            everything = arrivals(float("inf"), min(count, 200), seed)
            begun = time.perf_counter()
            asyncio.run(send(url, everything, max_open=64))
            capacity[kind] = len(everything) / (time.perf_counter() - begun)
            typer.echo(f"{kind}: {capacity[kind]:.2f} requests/s when saturated", err=True)
            for load in LOADS:
                rate = load * capacity[KINDS[0]]
                latencies[kind, load] = asyncio.run(send(url, arrivals(rate, count, seed)))
                typer.echo(f"{kind}: {load:.0%} done", err=True)
    typer.echo(
        "| engine | load | p50 ms: ours, request-level | ratio | p95 ms | ratio | p99 ms | ratio | "
        "of request-level's capacity |"
    )
    typer.echo("|" + " --- |" * 9)
    for load in LOADS:
        cells = []
        for share in (0.5, 0.95, 0.99):
            ours, theirs = (percentile(latencies[kind, load], share) for kind in KINDS)
            cells.append(f"{ours * 1e3:.0f}, {theirs * 1e3:.0f} | {ours / theirs:.2f}x")
        of_theirs = load * capacity[KINDS[0]] / capacity[KINDS[1]]
        typer.echo(f"| {engine} | {load:.0%} | {' | '.join(cells)} | {of_theirs:.0%} |")
