"""Does a replica keep its memory? Thousands of mixed requests at saturation, memory watched."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from typing import Annotated

import psutil
import typer

from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests import serving
from loadtests.client import Client, require_answers
from loadtests.plots import name_axes, panels
from loadtests.report import RESULTS, OutOption, Report
from loadtests.serving import Service
from loadtests.traffic import SIZES

MIB = 2**20
SAMPLE_EVERY_S = 1.0


class MemoryWatch:
    """Samples what the replica alone holds (unique set size) in a thread, until it is left."""

    def __init__(self, pid: int) -> None:
        self._replica = next(
            process
            for process in psutil.Process(pid).children(recursive=True)
            if "ServeReplica" in " ".join(process.cmdline())
        )
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.samples: list[int] = []  # bytes

    def _run(self) -> None:
        while not self._left.wait(SAMPLE_EVERY_S):
            self.samples.append(self._replica.memory_full_info().uss)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()


def quarters(samples: list[float]) -> list[float]:
    """The median of each quarter of the samples, in order.

    Raises:
        ValueError: fewer than four samples; the run was too short to say anything.
    """
    if len(samples) < 4:
        raise ValueError(f"{len(samples)} memory samples are too few; ask for more requests")
    bounds = [round(len(samples) * k / 4) for k in range(5)]
    return [statistics.median(samples[a:b]) for a, b in itertools.pairwise(bounds)]


def soak(
    model: Annotated[str, typer.Option(help="The model served.")] = "demo-lcm",
    count: Annotated[int, typer.Option(min=100, max=100_000, help="Requests.")] = 10_000,
    clients: Annotated[int, typer.Option(min=1, max=256, help="Requests open at a time.")] = 16,
    gpu_shaped: Annotated[
        bool, typer.Option("--gpu-shaped", help="Over an engine that sleeps as a GPU would draw.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 1,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Memory of the replica over many requests at saturation: the last quarter over the first.

    Every request must be answered with 200, or the command fails.
    """
    with serving.fourstep(model, cache_dir, gpu_shaped=gpu_shaped) as service:
        report = watch(service, count, clients, seed)
    report.write(out)


def watch(service: Service, count: int, clients: int, seed: int) -> Report:
    """Send ``count`` requests to a running Fourstep and watch its replica meanwhile."""
    client = Client(service.url)
    client.closed_loop(SIZES.asks(64, seed), clients)
    begun = time.perf_counter()
    with MemoryWatch(service.pid) as memory:
        answers = client.closed_loop(SIZES.asks(count, seed), clients)
    seconds = time.perf_counter() - begun
    require_answers(answers, "the service")
    mib = [sample / MIB for sample in memory.samples]
    medians = quarters(mib)
    report = Report("soak", f"Memory of a replica over {count} requests")
    report.data |= {"seconds": seconds, "mib": [round(value, 1) for value in mib]}
    cells = ", ".join(f"{median:.1f}" for median in medians)
    report.table(
        ["requests", "seconds", "requests/s", "MiB in each quarter", "last / first"],
        [[count, seconds, count / seconds, cells, f"{medians[-1] / medians[0]:.3f}×"]],
    )
    figure, (panel,) = panels()
    panel.plot([SAMPLE_EVERY_S * index for index in range(len(mib))], mib)
    panel.set_ylim(bottom=0)
    name_axes(panel, "Memory of the replica", "seconds at saturation", "MiB (unique set size)")
    report.figure("memory", figure, "Unique set size of the replica over time")
    return report
