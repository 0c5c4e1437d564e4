"""One Ray cluster over several zones, row by row: what `loadtests.region` counts.

Every node has a proxy, a request comes in through any of them, and a proxy knows just the requests
that it sent itself. A zone that is lost takes its replicas and its proxies with it.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator

from loadtests.fleet import TICK_S, Autoscaling, Event, Fleet
from loadtests.simulated import SimulatedReplica, SimulatedRow
from loadtests.timing import TimingDouble


class Cell(Fleet):
    """One run, like `Fleet`'s; ``refused`` and ``cut`` count the rows that got no image."""

    def __init__(
        self, timing: TimingDouble, config: Autoscaling, *, gpus: int, ready: int, zones: int = 3,
        max_waiting: int = 256, lost_at_s: float = float("inf"), lost_zone: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(timing, config)
        self._rng = random.Random(0)
        self._ready = [SimulatedReplica(timing) for _ in range(ready)]
        self._zones = {replica: index % zones for index, replica in enumerate(self._ready)}
        self._num_zones, self._zone_gpus = zones, gpus // zones
        self._target, self._max_waiting = ready, max_waiting
        self._lost_at_s, self._lost_zone = lost_at_s, lost_zone
        self._gone: set[SimulatedReplica] = set()
        self._sent: defaultdict[SimulatedReplica, Counter[SimulatedReplica]] = defaultdict(Counter)
        self._rows: defaultdict[SimulatedReplica, dict[SimulatedRow, SimulatedReplica]] = (
            defaultdict(dict)  # replica → its open rows → the replica beside whose proxy they wait
        )
        self.refused = self.cut = 0
        self.ready_s = 0.0  # as `Sums.replica_s` of `loadtests.region`, until the last arrival

    def _route(self, row: SimulatedRow, now: float) -> None:
        self._send(row, self._rng.choice(self._ready), now)

    def _send(self, row: SimulatedRow, proxy: SimulatedReplica, now: float) -> None:
        sent, rng = self._sent[proxy], self._rng
        replica = min(self._ready, key=lambda each: (sent[each], rng.random()))
        if replica.num_open >= self._max_waiting:
            self.refused += 1
            return
        sent[replica] += 1
        self._rows[replica][row] = proxy
        replica.add(row)
        if not replica.busy:
            self._push(now + replica.begin(), Event.CALL_DONE, replica)

    def _call_done(self, replica: SimulatedReplica, now: float) -> None:
        if replica not in self._gone:
            super()._call_done(replica, now)

    def _answer(self, row: SimulatedRow, replica: SimulatedReplica) -> None:
        proxy = self._rows[replica].pop(row)
        self._sent[proxy][replica] -= 1
        if proxy not in self._gone:  # else its client has no connection any more
            super()._answer(row, replica)

    def _become_ready(self, now: float) -> None:
        self._num_starting -= 1
        replica = SimulatedReplica(self._timing)
        held = Counter(self._zones[each] for each in self._ready)
        free = [z for z in range(self._num_zones) if z != self._lost_zone or now < self._lost_at_s]
        self._zones[replica] = min(free, key=lambda zone: held[zone])
        self._ready.append(replica)

    def _next_arrival(self, arrivals: Iterator[SimulatedRow]) -> None:
        num_before = len(self._events)
        super()._next_arrival(arrivals)
        self._over = len(self._events) == num_before

    def _tick(self, now: float) -> None:
        self.ready_s += 0.0 if self._over else len(self._ready) * TICK_S
        if now >= self._lost_at_s and not self._gone:
            self._lose(now)
        super()._tick(now)

    def _lose(self, now: float) -> None:
        gone = [each for each in self._ready if self._zones[each] == self._lost_zone]
        self._gone.update(gone)
        self._ready = [each for each in self._ready if each not in self._gone]
        for replica, rows in list(self._rows.items()):
            for row, proxy in list(rows.items()):
                if proxy in self._gone:
                    self.cut += 1
                elif replica in self._gone:  # its proxy sends it again, from its beginning
                    again = SimulatedRow(row.arrived_at, row.num_steps, row.size)
                    self._send(again, proxy, now)

    def _scale(self, count: int, num_open: float, now: float) -> None:
        self._target = self._autoscaler.wanted(num_open, self._target, now)
        zones = self._num_zones - bool(self._gone)
        for _ in range(min(self._target, zones * self._zone_gpus) - count):
            self._num_starting += 1
            self._push(now + self._config.cold_start_s, Event.READY)
        for _ in range(min(count - self._target, len(self._ready))):
            gone = min(self._ready, key=lambda replica: replica.num_open)
            self._ready.remove(gone)
            if not gone.idle:
                self._leaving.add(gone)
