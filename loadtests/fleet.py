"""Many replicas in simulated time: least-connections routing, Ray Serve's autoscaling, cold starts.

A discrete-event simulation whose replicas run the product's own scheduler (`loadtests.simulated`).
The rule is that of `ray.serve.autoscaling_policy`: replicas wanted = ongoing requests, averaged
over the look-back period, over the target; taken when it has been wanted for the whole delay.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from loadtests.simulated import SimulatedReplica, SimulatedRow
from loadtests.timing import TimingDouble

TICK_S = 1.0  # between two looks of the autoscaler; its delays are many of them


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """Ray Serve's ``autoscaling_config``, with Ray's defaults; equal bounds: a fixed fleet."""

    min_replicas: int
    max_replicas: int
    target_ongoing_requests: float = 2.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    look_back_period_s: float = 30.0
    cold_start_s: float = 20.0  # from the decision to the first request served
    downscaling_factor: float = 1.0  # of the way to what is wanted, in one step


class Autoscaler:
    """Ray Serve's rule for one deployment, asked once every ``TICK_S``."""

    def __init__(self, config: Autoscaling) -> None:
        self._config = config
        self._ongoing: deque[float] = deque(maxlen=round(config.look_back_period_s / TICK_S))
        self._wanted_for: tuple[int, float] = (0, 0.0)  # direction, since when

    def wanted(self, num_open: float, count: int, now: float) -> int:
        """Replicas that there should be; ``count`` while a delay has not passed."""
        config = self._config
        self._ongoing.append(num_open)
        average = sum(self._ongoing) / len(self._ongoing)
        exactly = average / config.target_ongoing_requests
        wanted = math.ceil(exactly)
        if wanted < count:
            wanted = math.ceil(count + config.downscaling_factor * (exactly - count))
            wanted = min(wanted, count - 1)  # as Ray has it: a step is never none
        wanted = min(max(wanted, config.min_replicas), config.max_replicas)
        direction = (wanted > count) - (wanted < count)
        if direction != self._wanted_for[0]:
            self._wanted_for = (direction, now)
        delay_s = config.upscale_delay_s if direction > 0 else config.downscale_delay_s
        if not direction or now - self._wanted_for[1] < delay_s:
            return count
        self._wanted_for = (0, now)
        return wanted


@dataclass
class Outcome:
    """What a fleet did with its traffic."""

    latencies_s: list[float] = field(default_factory=list)
    replica_s: float = 0.0  # paid for: from the decision to start one to its end
    max_replicas: int = 0
    history: list[tuple[float, int, float]] = field(default_factory=list)  # time, replicas, ongoing


class Event(IntEnum):
    ARRIVAL = 0
    CALL_DONE = 1
    READY = 2
    TICK = 3


class Fleet:
    """One run; `run` may be called once."""

    def __init__(self, timing: TimingDouble, config: Autoscaling) -> None:
        self._timing, self._config = timing, config
        self._ready: list[SimulatedReplica] = [
            SimulatedReplica(timing) for _ in range(config.min_replicas)
        ]
        self._num_starting = 0
        self._leaving: set[SimulatedReplica] = set()
        self._pending: deque[SimulatedRow] = deque()  # while no replica is ready
        self._autoscaler = Autoscaler(config)
        self._events: list[tuple[float, int, Event, object]] = []
        self._order = itertools.count()
        self.outcome = Outcome()

    def run(self, rows: Iterable[SimulatedRow]) -> Outcome:
        """Serve rows, in order of arrival, to the end."""
        arrivals = iter(rows)
        self._next_arrival(arrivals)
        self._push(TICK_S, Event.TICK)
        now = 0.0
        while self._events:
            now, _, kind, what = heapq.heappop(self._events)
            match kind:
                case Event.ARRIVAL:
                    self._route(what, now)  # type: ignore[arg-type]
                    self._next_arrival(arrivals)
                case Event.CALL_DONE:
                    self._call_done(what, now)  # type: ignore[arg-type]
                case Event.READY:
                    self._become_ready(now)
                case Event.TICK:
                    self._tick(now)
        return self.outcome

    def _push(self, time: float, kind: Event, what: object = None) -> None:
        heapq.heappush(self._events, (time, next(self._order), kind, what))

    def _next_arrival(self, arrivals: Iterator[SimulatedRow]) -> None:
        if (row := next(arrivals, None)) is not None:
            self._push(row.arrived_at, Event.ARRIVAL, row)

    def _route(self, row: SimulatedRow, now: float) -> None:
        if not self._ready:
            self._pending.append(row)
            return
        replica = min(self._ready, key=lambda replica: replica.num_open)
        replica.add(row)
        if not replica.busy:
            self._push(now + replica.begin(), Event.CALL_DONE, replica)

    def _call_done(self, replica: SimulatedReplica, now: float) -> None:
        for row in replica.finish(now):
            self._answer(row, replica)
        if not replica.idle:
            self._push(now + replica.begin(), Event.CALL_DONE, replica)
        else:
            self._leaving.discard(replica)

    def _answer(self, row: SimulatedRow, replica: SimulatedReplica) -> None:
        self.outcome.latencies_s.append(row.latency_s)

    def _become_ready(self, now: float) -> None:
        self._num_starting -= 1
        self._ready.append(SimulatedReplica(self._timing))
        while self._pending:
            self._route(self._pending.popleft(), now)

    def _tick(self, now: float) -> None:
        count = len(self._ready) + self._num_starting
        alive = count + len(self._leaving)
        num_open = sum(replica.num_open for replica in self._ready) + len(self._pending)
        self.outcome.replica_s += alive * TICK_S
        self.outcome.max_replicas = max(self.outcome.max_replicas, alive)
        self.outcome.history.append((now, count, num_open))
        self._scale(count, num_open, now)
        if self._events or num_open or self._leaving:
            self._push(now + TICK_S, Event.TICK)

    def _scale(self, count: int, num_open: float, now: float) -> None:
        wanted = self._autoscaler.wanted(num_open, count, now)
        for _ in range(wanted - count):
            self._num_starting += 1
            self._push(now + self._config.cold_start_s, Event.READY)
        for _ in range(min(count - wanted, len(self._ready))):
            gone = min(self._ready, key=lambda replica: replica.num_open)
            self._ready.remove(gone)
            if not gone.idle:
                self._leaving.add(gone)


def fixed(num_replicas: int) -> Autoscaling:
    return Autoscaling(num_replicas, num_replicas)


def highest_rate(
    timing: TimingDouble,
    rows_at: Callable[[float], list[SimulatedRow]],
    p95_s: float,
    saturated: float,
) -> float:
    """Arrivals a second at which one replica keeps p95 within ``p95_s``, by bisection."""
    low, high = 0.0, saturated
    while high - low > 0.02 * saturated:
        middle = (low + high) / 2
        latencies = sorted(Fleet(timing, fixed(1)).run(rows_at(middle)).latencies_s)
        if latencies[math.ceil(0.95 * len(latencies)) - 1] <= p95_s:
            low = middle
        else:
            high = middle
    return low
