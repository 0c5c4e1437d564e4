"""Does a replica keep its memory? Thousands of mixed requests at saturation, memory watched."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests import serving
from loadtests.abuse.page import OWN_BOUNDS, maltreat, page
from loadtests.client import Client, require_answers
from loadtests.plots import name_axes, panels
from loadtests.report import RESULTS, OutOption, Report
from loadtests.resources import Watch, quarters
from loadtests.serving import Service
from loadtests.traffic import SIZES


def soak(
    model: Annotated[str, typer.Option(help="The model served.")] = "demo-lcm",
    count: Annotated[int, typer.Option(min=100, max=100_000, help="Requests.")] = 10_000,
    clients: Annotated[int, typer.Option(min=1, max=256, help="Requests open at a time.")] = 16,
    abuse: Annotated[
        bool, typer.Option("--abuse", help="Abuse it beside ordinary load, for --seconds.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=5, max=3600, help="Of the abuse.")] = 600.0,
    gpu_shaped: Annotated[
        bool, typer.Option("--gpu-shaped", help="Over an engine that sleeps as a GPU would draw.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 1,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Memory of the replica over many requests at saturation: the last quarter over the first.

    Every request must be answered with 200, or the command fails. With --abuse: silent and unread
    connections, half bodies, hostile heads, large uploads and more of the kind, and what the
    service held and ordinary clients noticed meanwhile.
    """
    if abuse:
        with serving.fourstep(
            model, cache_dir, gpu_shaped=gpu_shaped, environment=OWN_BOUNDS
        ) as service:
            page(maltreat(service, seconds, seed), seconds).write(out)
        return
    with serving.fourstep(model, cache_dir, gpu_shaped=gpu_shaped) as service:
        report = watch(service, count, clients, seed)
    report.write(out)


def watch(service: Service, count: int, clients: int, seed: int) -> Report:
    """Send ``count`` requests to a running Fourstep and watch its replica meanwhile."""
    client = Client(service.url)
    client.closed_loop(SIZES.asks(64, seed), clients)
    begun = time.perf_counter()
    with Watch(service) as held:
        answers = client.closed_loop(SIZES.asks(count, seed), clients)
    seconds = time.perf_counter() - begun
    require_answers(answers, "the service")
    mib = held.mib()
    medians = quarters(mib)
    report = Report("soak", f"Memory of a replica over {count} requests")
    report.data |= {"seconds": seconds, "mib": [round(value, 1) for value in mib]}
    cells = ", ".join(f"{median:.1f}" for median in medians)
    report.table(
        ["requests", "seconds", "requests/s", "MiB in each quarter", "last / first"],
        [[count, seconds, count / seconds, cells, f"{medians[-1] / medians[0]:.3f}×"]],
    )
    figure, (panel,) = panels()
    panel.plot(held.at_s, mib)
    panel.set_ylim(bottom=0)
    name_axes(panel, "Memory of the replica", "seconds at saturation", "MiB (anonymous memory)")
    report.figure("memory", figure, "Anonymous memory of the replica over time")
    return report
