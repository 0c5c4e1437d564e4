"""Mixed load over HTTP: the product against request-level batching, in one run on one machine.

Each application runs alone; both meet the same arrivals.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from engines.cli import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests.open_loop import arrivals, percentile, send, serving

LOADS = (0.5, 0.7, 0.85)


def mixed(
    engine: Annotated[str, typer.Option(help="cpu, or gpu_shaped (a timing double).")] = "cpu",
    model: Annotated[str, typer.Option(help="The model both serve.")] = "demo-lcm",
    count: Annotated[int, typer.Option(min=10, max=5000, help="Requests per load.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 1,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
) -> None:
    """Latency at 50, 70 and 85 % of the product's capacity, over request-level batching's."""
    from loadtests.apps import ENGINES, KINDS

    if engine not in ENGINES:
        raise typer.BadParameter(f"--engine is {engine!r}; use {' or '.join(ENGINES)}")
    latencies: dict[tuple[str, float], list[float]] = {}
    capacity: dict[str, float] = {}
    for kind in KINDS:
        with serving(kind, engine, model, cache_dir) as service:
            asyncio.run(
                send(service.url, arrivals(float("inf"), 16, seed + 1))
            )  # connections, caches
            everything = arrivals(float("inf"), min(count, 200), seed)
            begun = time.perf_counter()
            asyncio.run(send(service.url, everything, max_open=64))
            capacity[kind] = len(everything) / (time.perf_counter() - begun)
            typer.echo(f"{kind}: {capacity[kind]:.2f} requests/s when saturated", err=True)
            for load in LOADS:
                rate = load * capacity[KINDS[0]]
                latencies[kind, load] = asyncio.run(send(service.url, arrivals(rate, count, seed)))
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
