"""`overload`: more than a service can draw, for a while. What it still does, and when it recovers.

Open loop: whoever is refused does not come back, and nobody waits for the others.
"""

from __future__ import annotations

import http.client
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer

from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests import serving
from loadtests.client import Answer, Client, Latencies
from loadtests.report import RESULTS, OutOption, Report
from loadtests.resources import Watch, quarters
from loadtests.serving import Service
from loadtests.traffic import MIXED, UNIFORM, poisson, until

CLIENTS = 16  # of the closed loop that finds the capacity
NEVER_S = 600.0  # after which a service that is still slow stays so
PROBE_EVERY_S = 0.2


def overload(
    factor: Annotated[float, typer.Option(min=1.1, max=20, help="Times the capacity.")] = 3.0,
    seconds: Annotated[float, typer.Option(min=2, max=600, help="Of the overload.")] = 60,
    deadline_s: Annotated[float, typer.Option(min=0.1, max=60, help="Of every request.")] = 2,
    model: Annotated[str, typer.Option(help="The model served.")] = "demo-lcm",
    gpu_shaped: Annotated[
        bool, typer.Option("--gpu-shaped", help="Over an engine that sleeps as a GPU would draw.")
    ] = False,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Goodput, latency and memory at several times the capacity, and the time to recover."""
    environment = {"FOURSTEP_REQUEST_TIMEOUT_S": str(deadline_s)}
    with serving.fourstep(
        model, cache_dir, gpu_shaped=gpu_shaped, environment=environment
    ) as service:
        report = press(service, factor, seconds, deadline_s)
    report.name += "-gpu-shaped" if gpu_shaped else ""
    report.write(out)


class ReadinessProbe:
    """Asks `/readyz` as a kubelet does, on a connection of its own each time, until it is left."""

    def __init__(self, url: str) -> None:
        self._address = urllib.parse.urlsplit(url).netloc
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._seconds: list[float] = []

    @property
    def latencies(self) -> Latencies:
        return Latencies(self._seconds)

    def _run(self) -> None:
        while not self._left.wait(PROBE_EVERY_S):
            begun = time.perf_counter()
            connection = http.client.HTTPConnection(self._address, timeout=30)
            connection.request("GET", "/readyz")
            connection.getresponse().read()
            connection.close()
            self._seconds.append(time.perf_counter() - begun)

    def __enter__(self) -> ReadinessProbe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()


def press(service: Service, factor: float, seconds: float, deadline_s: float) -> Report:
    """Find the capacity of a running Fourstep, exceed it, and watch it recover."""
    client = Client(service.url)
    client.closed_loop(MIXED.asks(64, 1), CLIENTS)
    capacity = _rate(client.closed_loop(MIXED.asks(100_000, 2), CLIENTS, max(5.0, seconds / 4)))
    alone_ms = Latencies(_probe(client).latency_s for _ in range(5)).ms(50)
    due_s = until(poisson(factor * capacity, 3), seconds)
    with Watch(service) as held, ReadinessProbe(service.url) as probe:
        answers = client.open_loop(MIXED.asks(len(due_s), 3), due_s)
    recovery_s = _recovery(client, 2 * alone_ms / 1e3)
    good = [answer for answer in answers if answer.ok]
    latencies = Latencies(answer.latency_s for answer in good)
    goodput = len(good) / seconds
    report = Report("overload", f"{factor:g} times the capacity for {seconds:.0f} s")
    report.text(
        f"Capacity {capacity:.2f} images/s ({CLIENTS} clients in a closed loop, 1 to 8 steps), "
        f"a deadline of {deadline_s:g} s. {len(answers)} requests came, one every "
        f"{1e3 / factor / capacity:.0f} ms on average, and **{goodput / capacity:.0%} of the "
        "capacity** was answered with an image. After the last the service was as quick as alone "
        f"within {recovery_s:.1f} s."
    )
    mib = held.mib()
    medians = quarters(mib)
    report.data |= {
        "capacity": capacity, "goodput": goodput, "recovery_s": recovery_s, "mib": mib,
        "probe_p99_ms": probe.latencies.ms(99),
        "statuses": dict(Counter(answer.status for answer in answers)), **latencies.summary(),
    }  # fmt: skip
    report.table(
        ["answered with an image", "of capacity", "p50, ms", "p95, ms", "deadline, ms",
         "refused (429)", "too late (504)", "no answer", "MiB, last quarter / first",
         "recovered after, s", "/readyz p50, p99, ms"],
        [[
            len(good), f"{goodput / capacity:.2f}×", f"{latencies.ms(50):.0f}",
            f"{latencies.ms(95):.0f}", f"{1e3 * deadline_s:.0f}", _count(answers, 429),
            _count(answers, 504), _count(answers, 0), f"{medians[-1] / medians[0]:.3f}×",
            f"{recovery_s:.1f}", f"{probe.latencies.ms(50):.0f}, {probe.latencies.ms(99):.0f}",
        ]],
    )  # fmt: skip
    return report


def _probe(client: Client) -> Answer:
    (answer,) = client.closed_loop(UNIFORM.asks(1, seed=time.perf_counter_ns()), 1)
    return answer


def _recovery(client: Client, quick_s: float) -> float:
    """Seconds until three requests in a row are answered as quickly as this; NaN: never."""
    begun = time.perf_counter()
    in_a_row: list[float] = []
    while len(in_a_row) < 3 and time.perf_counter() - begun < NEVER_S:
        answer = _probe(client)
        now = time.perf_counter() - begun
        in_a_row = [*in_a_row, now] if answer.ok and answer.latency_s <= quick_s else []
        time.sleep(PROBE_EVERY_S)
    return in_a_row[0] if in_a_row else float("nan")


def _rate(answers: Sequence[Answer]) -> float:
    good = [answer for answer in answers if answer.ok]
    return len(good) / max(answer.done_s for answer in good)


def _count(answers: Sequence[Answer], status: int) -> int:
    return sum(answer.status == status for answer in answers)
