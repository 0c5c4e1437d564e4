"""What HTTP costs: the service against the bare engine, both in one run on the same machine.

Start the service first (`fourstep serve`); this command opens the same model itself, measures the
bare engine with the service idle, then the service with the bare engine idle, in alternation.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Annotated

import httpx
import typer

from engines.runner import Runner

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def overhead(
    model: Annotated[str, typer.Option(help="The model the service serves.")] = "demo-lcm",
    url: Annotated[
        str, typer.Option(help="Base URL of a running service.")
    ] = "http://127.0.0.1:8000",
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Alternations.")] = 5,
    count: Annotated[int, typer.Option(min=4, max=1000, help="Images per round and side.")] = 40,
    clients: Annotated[int, typer.Option(min=1, max=64, help="Concurrent clients.")] = 8,
    steps: Annotated[int, typer.Option(min=1, max=8, help="Denoise calls per image.")] = 4,
    cache_dir: Annotated[Path, typer.Option(envvar="FOURSTEP_CACHE_DIR")] = Path(
        "~/.cache/fourstep"
    ),
) -> None:
    """Throughput ratio (many clients) and added latency (one) of HTTP over the bare engine."""
    if httpx.URL(url).host not in ("127.0.0.1", "localhost", "::1"):
        raise typer.BadParameter(f"--url is {url}; only this machine is measured ({LOOPBACK})")
    runner = Runner.open(model, backend="onnxruntime", cache_dir=cache_dir.expanduser())
    runner.warm_up()
    bare_rate, http_rate, bare_ms, http_ms = [], [], [], []
    for index in range(rounds):
        recipes = [runner.default_recipe(seed, "a red star", steps) for seed in range(count)]
        begun = time.perf_counter()
        runner.draw(recipes)
        bare_rate.append(count / (time.perf_counter() - begun))
        http_rate.append(count / asyncio.run(_load(url, count, clients, steps)))
        for recipe in recipes[: count // 2]:
            begun = time.perf_counter()
            runner.draw([recipe])
            bare_ms.append((time.perf_counter() - begun) * 1e3)
        http_ms += _one_client(url, count // 2, steps)
        typer.echo(f"round {index + 1}/{rounds}", err=True)
    typer.echo("| measure | bare engine | HTTP | |")
    typer.echo("| --- | --- | --- | --- |")
    ratio = statistics.median(h / b for h, b in zip(http_rate, bare_rate, strict=True))
    rates = statistics.median(bare_rate), statistics.median(http_rate)
    typer.echo(f"| images/s, {clients} clients | {rates[0]:.2f} | {rates[1]:.2f} | {ratio:.2f}× |")
    p50 = statistics.median(bare_ms), statistics.median(http_ms)
    typer.echo(f"| p50 ms, one client | {p50[0]:.1f} | {p50[1]:.1f} | +{p50[1] - p50[0]:.1f} ms |")


def _body(seed: int, steps: int) -> dict[str, object]:
    return {"prompt": "a red star", "seed": seed, "num_inference_steps": steps}


async def _load(url: str, count: int, clients: int, steps: int) -> float:
    """Seconds for ``count`` images over ``clients`` connections."""
    seeds = iter(range(count))
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def work() -> None:
            for seed in seeds:
                answer = await client.post(
                    "/v1/images/generations", json=_body(seed, steps), headers=RAW
                )
                answer.raise_for_status()

        begun = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        return time.perf_counter() - begun


def _one_client(url: str, count: int, steps: int) -> list[float]:
    latencies = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for seed in range(count):
            begun = time.perf_counter()
            client.post(
                "/v1/images/generations", json=_body(seed, steps), headers=RAW
            ).raise_for_status()
            latencies.append((time.perf_counter() - begun) * 1e3)
    return latencies


RAW = {"accept": "image/png"}
