"""A replica in simulated time: the product's own scheduler over a timing double."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engines.drawing.stage import Stage
from loadtests.timing import TimingDouble
from service.batching.scheduler import Scheduler, Work, WorkKind

FRAMES_AT_ONCE = 4  # of a clip, that one call decodes: as on a GPU


@dataclass(eq=False, slots=True)
class SimulatedRow:
    """One request of one image, or one clip."""

    arrived_at: float
    num_steps: int
    size: int
    num_frames: int = 1
    stage: Stage = Stage.DENOISE
    num_steps_left: int = field(init=False)
    num_frames_left: int = field(init=False)  # to decode
    finished_at: float = 0.0
    num_lanes: int = 1
    priority: int = 0
    tenant: str = ""
    deadline: float = float("inf")
    cancelled: bool = False
    live: bool = False

    def __post_init__(self) -> None:
        self.num_steps_left = self.num_steps
        self.num_frames_left = self.num_frames

    @property
    def group(self) -> tuple[int, ...]:
        return (self.size, self.size, self.num_frames)

    @property
    def encoding(self) -> tuple[int, ...]:
        return self.group

    @property
    def decoding(self) -> tuple[int, ...]:
        return (self.size, self.size, self.frames_at_once)

    @property
    def frames_at_once(self) -> int:
        return min(FRAMES_AT_ONCE, self.num_frames_left)

    @property
    def latency_s(self) -> float:
        return self.finished_at - self.arrived_at


class SimulatedReplica:
    """One engine: between `begin` and `finish` it is in a call."""

    def __init__(self, timing: TimingDouble) -> None:
        self._timing = timing
        self._scheduler: Scheduler[SimulatedRow] = Scheduler(timing.limits, timing)
        self._work: Work[SimulatedRow] | None = None
        self.num_open = 0

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    @property
    def busy(self) -> bool:
        return self._work is not None

    def add(self, row: SimulatedRow) -> None:
        self._scheduler.add([row])
        self.num_open += 1

    def run(
        self,
        rows: Iterable[SimulatedRow],
        beside: Iterable[SimulatedRow] = (),
        follow: Callable[[SimulatedRow], SimulatedRow] | None = None,
    ) -> list[SimulatedRow]:
        """Serve ``rows`` to the last of them; each comes at its `arrived_at`.

        Those ``beside`` them are not waited for: when one is done, ``follow`` says who comes then,
        now or later. Returns those of them that were done.
        """
        order = itertools.count()
        coming = [(row.arrived_at, next(order), row) for row in rows]
        left = {row for _, _, row in coming}
        coming += [(row.arrived_at, next(order), row) for row in beside]
        heapq.heapify(coming)
        now, done_beside = 0.0, []
        while left:
            if self.idle:
                now = max(now, coming[0][0])
            while coming and coming[0][0] <= now:
                self.add(heapq.heappop(coming)[-1])
            now += self.begin()
            for row in self.finish(now):
                if row in left:
                    left.remove(row)
                    continue
                done_beside.append(row)
                if follow is not None:
                    then = follow(row)
                    heapq.heappush(coming, (then.arrived_at, next(order), then))
        return done_beside

    def begin(self) -> float:
        """Seconds that the next engine call takes."""
        self._work = work = self._scheduler.schedule()
        assert work is not None, "an open row always has work"
        denoise = work.kind is WorkKind.DENOISE
        cost = self._timing.step if denoise else self._timing.decode
        counts = [
            (row.size, row.num_frames if denoise else row.frames_at_once) for row in work.rows
        ]
        seconds = self._timing.seconds(cost, [size for size, count in counts for _ in range(count)])
        return seconds if denoise else seconds + self._timing.overhead_s * len(work.rows)

    def finish(self, now: float) -> list[SimulatedRow]:
        """End the call; the rows that are done."""
        work, self._work = self._work, None
        assert work is not None, "begin() comes first"
        for row in work.rows:
            if work.kind is WorkKind.DENOISE:
                row.num_steps_left -= 1
                row.stage = Stage.DENOISE if row.num_steps_left else Stage.DECODE
            else:
                row.num_frames_left -= row.frames_at_once
                if not row.num_frames_left:
                    row.stage, row.finished_at = Stage.DONE, now
        done = self._scheduler.update(work)
        self._scheduler.release(work)
        self.num_open -= len(done)
        return done
