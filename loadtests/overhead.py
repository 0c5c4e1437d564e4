"""`overhead`: where each millisecond of a request goes, and what HTTP costs the bare engine.

The budget puts three clocks side by side: the client's, the server's own (Server-Timing for the
stages, `/metrics` for the whole exchange), and a probe's for what lies between (through the same
proxy, answered at once). What they say of one request must add up.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer
from matplotlib.figure import Figure
from tqdm import tqdm

from engines.drawing.runner import Runner
from engines.families.recipe import Recipe
from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR, Order
from loadtests.capacity import started_or_named
from loadtests.client import AllowHostOption, Answer, Client, UrlOption, require_answers
from loadtests.plots import COLORS, name_axes, panels, stacked
from loadtests.probe import Connection
from loadtests.report import RESULTS, OutOption, Report
from loadtests.scrape import Scrape
from loadtests.traffic import Ask, Profile

ENGINE = ("encode_text", "encode_image", "denoise", "decode")
WITHIN = 0.05  # what the clocks may disagree by


@dataclasses.dataclass(frozen=True)
class Budget:
    """Mean milliseconds of a request by where they went; ``client`` is the client's own clock."""

    parts: dict[str, float]
    client: float

    @property
    def missing(self) -> float:
        """What no part accounts for, as a share of the client's time; below 0: counted twice."""
        return 1 - sum(self.parts.values()) / self.client


def budget(answers: list[Answer], server_ms: float, way_ms: float) -> Budget:
    """Client, server and probe put together.

    Args:
        server_ms: of the whole exchange in the replica, from its histogram.
        way_ms: of a request that the replica answers at once: connection, proxy and back.
    """

    def mean(*names: str) -> float:
        return statistics.fmean(sum(a.timings.get(n, 0.0) for n in names) for a in answers)

    stages = mean("queue", *ENGINE, "image_encode")
    parts = {
        "proxy and connection": way_ms,
        "parsing": mean("parse"),
        "queue": mean("queue"),
        "engine": mean(*ENGINE),
        "image encoding": mean("image_encode"),
        "between engine calls": mean("total") - stages,
        "response": server_ms - mean("parse", "total"),
    }
    return Budget(parts, 1e3 * statistics.fmean(answer.latency_s for answer in answers))


def overhead(
    url: UrlOption = "",
    allow_host: AllowHostOption = None,
    model: Annotated[str, typer.Option(help="The model the service serves.")] = "demo-lcm",
    rounds: Annotated[int, typer.Option(min=1, max=50, help="Alternations.")] = 6,
    count: Annotated[int, typer.Option(min=4, max=1000, help="Images per round and side.")] = 96,
    clients: Annotated[
        int, typer.Option(min=1, max=64, help="Concurrent clients; two for each row of a batch.")
    ] = 32,
    steps: Annotated[int, typer.Option(min=1, max=8, help="Denoise calls per image.")] = 4,
    size_px: Annotated[int, typer.Option(min=64, max=2048, help="Side of the images.")] = 128,
    num_threads: Annotated[
        int, typer.Option(min=0, envvar="FOURSTEP_NUM_THREADS", help="As the service has it.")
    ] = 0,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """The budget of a request, one client and many; throughput and latency over the bare engine."""
    order = Order(model, "onnxruntime", cache_dir=cache_dir, num_threads=num_threads or None)
    profile = Profile("budget", (steps,), (size_px,))
    with started_or_named(url, allow_host, model, cache_dir) as base:
        runner = Runner.open(order)
        runner.warm_up()
        comparison = _compare(base, runner, profile, rounds, count, clients)
        runner.close()
        budgets = {
            "one client": _budget_of(base, profile, count, 1),
            f"{clients} clients": _budget_of(base, profile, count * 2, clients),
        }
    report = Report("overhead", f"Where a request's time goes: {steps} steps, {size_px} px")
    report.data["budgets"] = {
        name: dataclasses.asdict(each) | {"missing": each.missing} for name, each in budgets.items()
    }
    _write_budgets(report, budgets)
    _write_comparison(report, comparison, clients)
    report.write(out)


def _budget_of(url: str, profile: Profile, count: int, clients: int) -> Budget:
    asks = profile.asks(count, seed=clients)
    client = Client(url)
    before = Scrape.of(url)
    with ThreadPoolExecutor(1) as pool, Connection(url) as probe:
        loaded = pool.submit(client.closed_loop, asks, clients)
        # One client finds the service idle, many find it busy: the probe goes where they go.
        way = [] if clients == 1 else probe.round_trips_ms(loaded.done)
        answers = loaded.result()
        during = Scrape.of(url).since(before)
        way = way or probe.round_trips_ms(iter([False] * count + [True]).__next__)
    require_answers(answers, "the service")
    server_ms = 1e3 * during.mean("fourstep_request_seconds", endpoint="generations")
    return budget(answers, server_ms, statistics.median(way))


@dataclasses.dataclass
class Comparison:
    """Bare engine and HTTP, in turns, so that both find the same machine."""

    bare_rate: list[float] = dataclasses.field(default_factory=list)
    http_rate: list[float] = dataclasses.field(default_factory=list)
    bare_ms: list[float] = dataclasses.field(default_factory=list)
    http_ms: list[float] = dataclasses.field(default_factory=list)


def _compare(
    url: str, runner: Runner, profile: Profile, rounds: int, count: int, clients: int
) -> Comparison:
    found, client = Comparison(), Client(url)
    for index in tqdm(range(rounds), desc="bare engine and HTTP", unit="round"):
        asks = profile.asks(count + 2 * clients, seed=index)
        recipes = [_recipe(runner, ask) for ask in asks[:count]]
        found.bare_rate.append(_bare_rate(runner, recipes))
        answers = client.closed_loop(asks, clients)
        require_answers(answers, "the service")
        # Neither the first of each client, who all came at once, nor the last, whom nobody follows.
        done_s = sorted(answer.done_s for answer in answers)
        found.http_rate.append(count / (done_s[count + clients - 1] - done_s[clients - 1]))
        with Connection(url) as connection:
            for ask, recipe in zip(asks[: count // 2], recipes, strict=False):
                found.bare_ms.append(_milliseconds(lambda recipe=recipe: runner.draw([recipe])))  # type: ignore[misc]
                found.http_ms.append(_milliseconds(lambda ask=ask: connection.draw(ask)))  # type: ignore[misc]
    return found


def _bare_rate(runner: Runner, recipes: list[Recipe]) -> float:
    """Images a second in full batches, as many side by side as the engine takes calls."""
    num_rows = runner.info.max_batch
    batches = [recipes[start : start + num_rows] for start in range(0, len(recipes), num_rows)]
    with ThreadPoolExecutor(runner.info.max_calls) as pool:
        begun = time.perf_counter()
        for _ in pool.map(runner.draw, batches):
            pass
        return len(recipes) / (time.perf_counter() - begun)


def _recipe(runner: Runner, ask: Ask) -> Recipe:
    plain = runner.default_recipe(ask.seed, ask.prompt, ask.num_steps)
    return dataclasses.replace(plain, width_px=ask.size_px, height_px=ask.size_px)


def _milliseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3


def _write_budgets(report: Report, budgets: dict[str, Budget]) -> None:
    names = list(budgets)
    rows: list[list[object]] = [
        [part, *(f"{budgets[name].parts[part]:.2f}" for name in names)]
        for part in budgets[names[0]].parts
    ]
    rows.append(["**sum**", *(f"{sum(budgets[name].parts.values()):.2f}" for name in names)])
    rows.append(["**client's clock**", *(f"{budgets[name].client:.2f}" for name in names)])
    rows.append(["unaccounted for", *(f"{budgets[name].missing:+.1%}" for name in names)])
    report.table(["ms of a request, mean", *names], rows)
    for name, each in budgets.items():
        if abs(each.missing) > WITHIN:
            report.text(
                f"**{name}: the clocks disagree by {each.missing:+.1%}, more than {WITHIN:.0%}.**"
            )
    report.figure("budget", _plot(budgets), "Stages of a request, stacked")


def _plot(budgets: dict[str, Budget]) -> Figure:
    """The whole of every budget, and what the first one spends beside the engine."""
    figure, (left, right) = panels(2, height=3.0)
    first, parts = next(iter(budgets.items()))
    series = {
        part: [max(0.0, each.parts[part]) for each in budgets.values()] for part in parts.parts
    }
    stacked(left, list(budgets), series)
    name_axes(left, "Where a request's time goes", "ms, mean", "")
    beside = {part: ms for part, ms in parts.parts.items() if part != "engine"}
    bars = right.barh(list(beside), list(beside.values()), color=COLORS[0], height=0.62)
    right.bar_label(bars, fmt="%.2f", padding=4)
    right.invert_yaxis()
    right.grid(False, axis="y")
    right.margins(x=0.18)
    name_axes(right, f"Beside the engine: {first}", "ms, mean", "")
    return figure


def _write_comparison(report: Report, found: Comparison, clients: int) -> None:
    report.data["comparison"] = dataclasses.asdict(found)
    pairs = zip(found.http_rate, found.bare_rate, strict=True)
    ratio = statistics.median(http / bare for http, bare in pairs)
    added = statistics.median(h - b for h, b in zip(found.http_ms, found.bare_ms, strict=True))
    bare, http = statistics.median(found.bare_rate), statistics.median(found.http_rate)
    bare_ms, http_ms = statistics.median(found.bare_ms), statistics.median(found.http_ms)
    report.table(
        ["measure", "bare engine", "HTTP", ""],
        [
            [f"images/s, {clients} clients", f"{bare:.2f}", f"{http:.2f}", f"{ratio:.2f}×"],
            ["p50 ms, one client", f"{bare_ms:.1f}", f"{http_ms:.1f}", f"{added:+.1f} ms"],
        ],
    )
