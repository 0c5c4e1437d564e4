"""A region's replicas, counted: zones, nodes that come late and go, autoscaling, a bounded queue.

One tick is a second. What a replica does at its load is a `LoadCurve`'s; which replicas there
should be is Ray Serve's rule, for each Ray cluster of the region by itself (`loadtests.fleet`).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loadtests.curve import MOST, LoadCurve
from loadtests.fleet import TICK_S, Autoscaler, Autoscaling

HISTORY_S = 60
EDGES_S = np.geomspace(1e-3, 1e3, 1200)  # of the latencies' histogram: 1.2 % apart


@dataclass(frozen=True)
class Supply:
    """Where GPUs come from, how late, and how they are lost."""

    gpus: int  # of the region, in equal zones; a node has one
    zones: int = 3
    cell: int = 100  # replicas of one Ray cluster
    node_s: float = 240.0  # a machine, its image
    load_s: float = 30.0  # a process and its model
    idle_s: float = 300.0  # a node without a replica is kept (`idleTimeoutSeconds`)
    spot_share: float = 0.0
    spot_losses_per_hour: float = 0.05  # of each spot node
    max_waiting: int = 256  # images of one replica, more are refused


@dataclass
class Sums:
    """What a region did and what it costs."""

    served: float = 0.0
    refused: float = 0.0
    cut: float = 0.0  # their connection ended in a node that was lost
    spot_lost: int = 0
    replica_s: float = 0.0
    node_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))  # on demand, spot
    length_s: float = 0.0
    longest_wait_s: float = 0.0
    latencies: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(EDGES_S) + 1))
    history: list[tuple[float, int, float, float]] = field(default_factory=list)
    # time, replicas, seconds of queue, images/s due

    def add(self, other: Sums) -> None:
        for name in ("served", "refused", "cut", "spot_lost", "replica_s", "node_s", "latencies"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest_wait_s = max(self.longest_wait_s, other.longest_wait_s)
        self.length_s = max(self.length_s, other.length_s)

    @property
    def mean_replicas(self) -> float:
        return self.replica_s / self.length_s

    def percentile_s(self, share: float) -> float:
        """The latency within which ``share`` of what was served was answered."""
        total = np.cumsum(self.latencies)
        if not total[-1]:
            return math.nan
        return float(EDGES_S[min(np.searchsorted(total, share * total[-1]), len(EDGES_S) - 1)])


class Region:
    """One region in counts; `tick` once a second, in order."""

    def __init__(
        self, curve: LoadCurve, config: Autoscaling, supply: Supply, ready: int, seed: int
    ) -> None:
        self._curve, self._supply = curve, supply
        self._cells = math.ceil(supply.gpus / supply.cell)
        per_cell = dataclasses.replace(
            config,
            min_replicas=math.ceil(config.min_replicas / self._cells),
            max_replicas=math.ceil(config.max_replicas / self._cells),
        )
        self._autoscaler = Autoscaler(per_cell)
        self._rng = np.random.default_rng(seed)
        self._ready = np.zeros((supply.zones, 2), dtype=int)  # by zone; on demand, spot
        self._starting: list[tuple[float, int, int]] = []  # a heap of: due, zone, kind
        self._num_starting = np.zeros_like(self._ready)
        self._idle: deque[tuple[float, int, int]] = deque()  # until, zone, kind; in that order
        self._num_idle = np.zeros_like(self._ready)
        self._stock = np.full(supply.zones, supply.gpus // supply.zones)
        self._backlog = 0.0  # images beyond what replicas that keep up have in hand
        self._per_cell = max(1, math.ceil(ready / self._cells))
        for number in range(min(ready, int(self._stock.sum()))):
            self._ready[number % supply.zones, self._kind()] += 1
        self.sums = Sums()

    @property
    def num_ready(self) -> int:
        return int(self._ready.sum())

    def capacity(self) -> float:
        """Images a second that the ready replicas keep up with."""
        return self.num_ready * self._curve.saturated * MOST

    def tick(self, now: float, rate: float, *, far: float = 0.0, far_s: float = 0.0) -> None:
        """A second of ``rate`` images; of them ``far`` come from elsewhere, ``far_s`` later."""
        self._arrive(now)
        self._lose_spot(now)
        load, wait_s, served = self._serve(rate)
        self._count(load, wait_s, served, far / rate if rate else 0.0, far_s)
        ongoing = self.num_ready * self._curve.ongoing_at(load) + self._backlog
        self._per_cell = self._autoscaler.wanted(ongoing / self._cells, self._per_cell, now)
        self._scale(now)
        sums = self.sums
        sums.node_s += (self._ready + self._num_starting + self._num_idle).sum(axis=0) * TICK_S
        sums.replica_s += self.num_ready * TICK_S
        sums.length_s += TICK_S
        if now % HISTORY_S == 0:
            sums.history.append((now, self.num_ready, wait_s, rate))

    def _serve(self, rate: float) -> tuple[float, float, float]:
        """Load, seconds in the queue, images served."""
        capacity = self.capacity()
        due = rate * TICK_S + self._backlog
        served = min(due, capacity * TICK_S)
        wait_s = self._backlog / capacity if capacity else 0.0
        room = self.num_ready * max(0.0, self._supply.max_waiting - self._curve.ongoing_at(MOST))
        self._backlog = min(due - served, room)
        self.sums.refused += due - served - self._backlog
        load = served / (self.num_ready * self._curve.saturated) if served else 0.0
        return load, wait_s, served

    def _count(self, load: float, wait_s: float, served: float, far: float, far_s: float) -> None:
        sums = self.sums
        sums.served += served
        sums.longest_wait_s = max(sums.longest_wait_s, wait_s)
        latencies = self._curve.latencies_s(load) + wait_s
        for share, more_s in ((1 - far, 0.0), (far, far_s)):
            if share > 0:
                places = np.searchsorted(EDGES_S, latencies + more_s)
                np.add.at(sums.latencies, places, share * served / len(latencies))

    def lose_zone(self, zone: int) -> None:
        """All its nodes at once, and no new one until `find_zone`.

        What had come in through its proxies is cut; what these had sent to other zones is lost with
        them, and what others had sent here they send again.
        """
        ready = self.num_ready
        if ready:
            load = min(MOST, self.sums.history[-1][3] / (ready * self._curve.saturated))
            open_now = ready * self._curve.ongoing_at(load) + self._backlog
            self.sums.cut += open_now * float(self._ready[zone].sum()) / ready
        for counts in (self._ready, self._num_starting, self._num_idle):
            counts[zone] = 0
        self._starting = [each for each in self._starting if each[1] != zone]
        heapq.heapify(self._starting)
        self._idle = deque(each for each in self._idle if each[1] != zone)
        self._stock[zone] = 0

    def find_zone(self, zone: int) -> None:
        self._stock[zone] = self._supply.gpus // self._supply.zones

    def _arrive(self, now: float) -> None:
        while self._starting and self._starting[0][0] <= now:
            _, zone, kind = heapq.heappop(self._starting)
            self._num_starting[zone, kind] -= 1
            self._ready[zone, kind] += 1
        while self._idle and self._idle[0][0] <= now:
            _, zone, kind = self._idle.popleft()
            self._num_idle[zone, kind] -= 1

    def _lose_spot(self, now: float) -> None:
        """With their notice: what they have in hand is drawn to its end, so nothing is cut."""
        chance = self._supply.spot_losses_per_hour / 3600 * TICK_S
        lost = self._rng.binomial(self._ready[:, 1], chance)
        self._ready[:, 1] -= lost
        self.sums.spot_lost += int(lost.sum())

    def _scale(self, now: float) -> None:
        """As many replicas as are wanted: what is lost is replaced without asking the rule."""
        wanted = min(self._per_cell * self._cells, self._supply.gpus)
        count = self.num_ready + len(self._starting)
        for _ in range(wanted - count):
            if not self._start(now):
                break
        for _ in range(min(count - wanted, self.num_ready)):
            zone, kind = (int(each) for each in divmod(int(self._ready.argmax()), 2))
            self._ready[zone, kind] -= 1
            self._num_idle[zone, kind] += 1
            self._idle.append((now + self._supply.idle_s, zone, kind))

    def _start(self, now: float) -> bool:
        """A replica on the node that has been idle for the shortest time, else on a new one."""
        supply = self._supply
        if self._idle:
            _, zone, kind = self._idle.pop()
            self._num_idle[zone, kind] -= 1
            due = now + supply.load_s
        else:
            held = (self._ready + self._num_starting).sum(axis=1)
            zone = int(np.where(held < self._stock, held, np.iinfo(held.dtype).max).argmin())
            if held[zone] >= self._stock[zone]:
                return False
            due, kind = now + supply.node_s + supply.load_s, self._kind()
        heapq.heappush(self._starting, (due, zone, kind))
        self._num_starting[zone, kind] += 1
        return True

    def _kind(self) -> int:
        """1 for spot, as long as too few of all are."""
        demand, spot = (self._ready + self._num_starting).sum(axis=0)
        return int(spot < self._supply.spot_share * (demand + spot + 1))
