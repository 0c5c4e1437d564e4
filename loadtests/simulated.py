"""A replica in simulated time: the product's own scheduler over a timing double."""

from __future__ import annotations

from dataclasses import dataclass, field

from engines.drawing.stage import Stage
from loadtests.timing import TimingDouble
from service.batching.scheduler import Scheduler, Work, WorkKind


@dataclass(eq=False, slots=True)
class SimulatedRow:
    """One request of one image."""

    arrived_at: float
    num_steps: int
    size: int
    stage: Stage = Stage.DENOISE
    num_steps_left: int = field(init=False)
    finished_at: float = 0.0
    num_lanes: int = 1
    priority: int = 0
    tenant: str = ""
    deadline: float = float("inf")
    cancelled: bool = False
    live: bool = False

    def __post_init__(self) -> None:
        self.num_steps_left = self.num_steps

    @property
    def group(self) -> tuple[int, int]:
        return (self.size, self.size)

    @property
    def decoding(self) -> tuple[int, int]:
        return self.group

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

    def begin(self) -> float:
        """Seconds that the next engine call takes."""
        self._work = work = self._scheduler.schedule()
        assert work is not None, "an open row always has work"
        denoise = work.kind is WorkKind.DENOISE
        cost = self._timing.step if denoise else self._timing.decode
        seconds = self._timing.seconds(cost, [row.size for row in work.rows])
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
                row.stage, row.finished_at = Stage.DONE, now
        done = self._scheduler.update(work)
        self._scheduler.release(work)
        self.num_open -= len(done)
        return done
