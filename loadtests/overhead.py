"""What HTTP costs: the service against the bare engine, both in one run on the same machine.

Start the service first (`fourstep serve`); this command opens the same model itself and measures
the bare engine with the service idle, then the service with the engine idle: throughput in turns,
one client's latency image by image, so that both find the same machine and equally cold caches.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import statistics
import threading
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer

from engines.cli import CacheOption
from engines.order import DEFAULT_CACHE_DIR, Order
from engines.runner import Runner

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PATH = "/v1/images/generations"
PROMPT = "a large red star at the center on a yellow background, by day, flat"
HEADERS = {"content-type": "application/json", "accept": "image/png"}


def overhead(
    model: Annotated[str, typer.Option(help="The model the service serves.")] = "demo-lcm",
    url: Annotated[
        str, typer.Option(help="Base URL of a running service.")
    ] = "http://127.0.0.1:8000",
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Alternations.")] = 5,
    count: Annotated[int, typer.Option(min=4, max=1000, help="Images per round and side.")] = 40,
    clients: Annotated[int, typer.Option(min=1, max=64, help="Concurrent clients.")] = 8,
    steps: Annotated[int, typer.Option(min=1, max=8, help="Denoise calls per image.")] = 4,
    size_px: Annotated[int, typer.Option(min=64, max=2048, help="Side of the images.")] = 128,
    num_threads: Annotated[
        int, typer.Option(min=0, envvar="FOURSTEP_NUM_THREADS", help="As the service has it.")
    ] = 0,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
) -> None:
    """Throughput ratio (many clients) and added latency (one) of HTTP over the bare engine."""
    if urllib.parse.urlsplit(url).hostname not in LOOPBACK:
        raise typer.BadParameter(
            f"--url is {url}; only this machine is measured ({', '.join(LOOPBACK)})"
        )
    order = Order(model, "onnxruntime", cache_dir=cache_dir, num_threads=num_threads or None)
    runner = Runner.open(order)
    runner.warm_up()
    ask = {"prompt": PROMPT, "num_inference_steps": steps, "size": f"{size_px}x{size_px}"}
    client = _Client(url)
    bare_rate, http_rate, bare_ms, http_ms = [], [], [], []
    for index in range(rounds):
        recipes = [
            dataclasses.replace(
                runner.default_recipe(seed, PROMPT, steps), width_px=size_px, height_px=size_px
            )
            for seed in range(count)
        ]
        begun = time.perf_counter()
        runner.draw(recipes)
        bare_rate.append(count / (time.perf_counter() - begun))
        http_rate.append(count / _load(url, count, clients, ask))
        for seed, recipe in enumerate(recipes[: count // 2]):
            bare_ms.append(_milliseconds(lambda recipe=recipe: runner.draw([recipe])))
            http_ms.append(_milliseconds(lambda seed=seed: client.draw(ask, seed)))
        typer.echo(f"round {index + 1}/{rounds}", err=True)
    typer.echo("| measure | bare engine | HTTP | |")
    typer.echo("| --- | --- | --- | --- |")
    ratio = statistics.median(h / b for h, b in zip(http_rate, bare_rate, strict=True))
    rates = statistics.median(bare_rate), statistics.median(http_rate)
    typer.echo(f"| images/s, {clients} clients | {rates[0]:.2f} | {rates[1]:.2f} | {ratio:.2f}× |")
    p50 = statistics.median(bare_ms), statistics.median(http_ms)
    added = statistics.median(h - b for h, b in zip(http_ms, bare_ms, strict=True))
    typer.echo(f"| p50 ms, one client | {p50[0]:.1f} | {p50[1]:.1f} | {added:+.1f} ms |")


class _Client:
    """One kept-alive connection of the standard library, the client that costs least CPU.

    It shares the cores with what it measures.
    """

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None, "checked on entry"
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=120)

    def draw(self, ask: dict[str, Any], seed: int) -> None:
        self._connection.request("POST", PATH, json.dumps(ask | {"seed": seed}), HEADERS)
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the service answered {answer.status}: {data[:500]!r}")


def _load(url: str, count: int, clients: int, ask: dict[str, Any]) -> float:
    """Seconds for ``count`` images over ``clients`` connections."""
    seeds = iter(range(count))
    lock = threading.Lock()

    def work(client: _Client) -> None:
        while True:
            with lock:
                seed = next(seeds, None)
            if seed is None:
                return
            client.draw(ask, seed)

    with ThreadPoolExecutor(clients) as pool:
        begun = time.perf_counter()
        for done in [pool.submit(work, _Client(url)) for _ in range(clients)]:
            done.result()
        return time.perf_counter() - begun


def _milliseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3
