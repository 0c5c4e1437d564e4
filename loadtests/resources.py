"""What the processes of a service hold over time: memory, file descriptors, threads."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from dataclasses import dataclass, field

import psutil

from loadtests.serving import MIB, Service

SAMPLE_EVERY_S = 1.0
REPLICA, HAPROXY = "replica", "HAProxy"


@dataclass(frozen=True, slots=True)
class Held:
    """By all processes of a kind together."""

    mib: float  # anonymous memory: what is in no file. To ask for it holds up no process
    fds: int
    threads: int

    def __add__(self, other: Held) -> Held:
        return Held(self.mib + other.mib, self.fds + other.fds, self.threads + other.threads)


NOTHING = Held(0.0, 0, 0)


def held_by(service: Service) -> dict[str, Held]:
    """What its replicas and its HAProxy (all of them, while one gives way to another) hold."""
    found: dict[str, Held] = {}
    for process in service.processes():
        try:
            name = process.name()
            kind = HAPROXY if name == "haproxy" else REPLICA
            if kind == HAPROXY or name.startswith("ray::ServeRepl"):
                memory = process.memory_info()
                mib = (memory.rss - memory.shared) / MIB
                held = Held(mib, process.num_fds(), process.num_threads())
                found[kind] = found.get(kind, NOTHING) + held
        except psutil.NoSuchProcess:
            continue
    return found


@dataclass
class Watch:
    """Samples them once a second until it is left. One in which a kind is not there is left out."""

    service: Service
    at_s: list[float] = field(default_factory=list)  # of each sample, from the beginning
    samples: list[dict[str, Held]] = field(default_factory=list)
    _left: threading.Event = field(default_factory=threading.Event)

    def mib(self, kind: str = REPLICA) -> list[float]:
        return [sample[kind].mib for sample in self.samples]

    def _run(self, kinds: set[str]) -> None:
        begun = time.monotonic()
        while not self._left.wait(SAMPLE_EVERY_S):
            found = held_by(self.service)
            if kinds <= found.keys():
                self.at_s.append(time.monotonic() - begun)
                self.samples.append(found)

    def __enter__(self) -> Watch:
        kinds = set(held_by(self.service))
        if REPLICA not in kinds:
            raise RuntimeError("no replica runs, so there is nothing to watch")
        self._thread = threading.Thread(target=self._run, args=(kinds,))
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
