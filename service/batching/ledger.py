"""The accepted requests: from acceptance to the one `Resolved` event that each of them gets.

Kept by the engine loop under its lock: no threads, no clock (time is passed in), no engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

from service.batching.backlog import Backlog
from service.batching.pace import Pace
from service.batching.request import (
    Event,
    Finished,
    Kind,
    Preview,
    Request,
    Resolved,
    Row,
    StageRecord,
    Status,
)
from service.batching.scheduler import Limits, Scheduler, Work, WorkKind
from service.errors import Cancelled, DeadlineExceeded, EngineFailure, ServiceError


class Observer(Protocol):
    """Told of every engine call and every change of the two sets: `service.telemetry.metrics`."""

    def engine_call(
        self,
        kind: WorkKind,
        num_rows: int,
        num_lanes: int,
        seconds: float,
        busy_s: float,
        decoder: str = "",
    ) -> None:
        """A call of ``seconds``, in ``busy_s`` of which no other call had been running already;
        a decode's by ``decoder``.
        """
        ...

    def rows(self, waiting: int, running: int) -> None: ...
    def queue_wait(self, seconds: float) -> None: ...


class Ledger:
    """What is open, whose turn it is, and what every call brought. ``post`` is given each event;
    it may not call back.
    """

    def __init__(
        self,
        limits: Limits,
        observer: Observer,
        max_waiting: int,
        post: Callable[[Request, Event], None],
    ) -> None:
        self._pace = Pace()
        self._scheduler: Scheduler[Row] = Scheduler(limits, self._pace)
        self._backlog = Backlog(max_waiting)
        self._observer = observer
        self._post = post
        self.open: set[Request] = set()  # accepted and not resolved
        self._num_calls = 0  # that came back
        self._last_call_ended_at = 0.0

    def check(self, num_images: int, kind: Kind, left_s: float) -> None:
        """Raise `Overloaded` where a request of so many images, or a clip of so many frames, has no
        room, or no time.
        """
        self._backlog.check(num_images, kind, left_s)

    def accept(self, request: Request) -> None:
        self._backlog.add(request)
        self.open.add(request)
        self._scheduler.add(request.rows)

    # -- a call: chosen, accounted for, delivered --------------------------------------------

    def choose(self, now: float) -> Work[Row] | None:
        """The next call; before that, whoever is cancelled or too late is let go."""
        self._sweep(now)
        work = self._scheduler.schedule()
        self._observer.rows(len(self._scheduler.waiting), len(self._scheduler.running))
        if work is not None:
            self._begin(work, now)
        return work

    @property
    def has_more(self) -> bool:
        """Whether the last choice left rows for another call beside it."""
        return self._scheduler.has_more

    def release(self, work: Work[Row]) -> None:
        """What was chosen is over, however it went."""
        self._scheduler.release(work)

    def _sweep(self, now: float) -> None:
        num_rows = len(self._scheduler.waiting) + len(self._scheduler.running)
        least_s = functools.partial(self._pace.least_s, num_rows=num_rows)
        for request in requests_of(self._scheduler.sweep(now, least_s)):
            if any(row.cancelled for row in request.rows):
                error: ServiceError = Cancelled("the client closed the request")
                self.fail(request, Status.CANCELLED, error, now)
            else:
                error = DeadlineExceeded(
                    "not finished by its deadline; ask for fewer steps or images, or raise it "
                    "(X-Request-Timeout)"
                )
                self.fail(request, Status.EXPIRED, error, now)

    def _begin(self, work: Work[Row], now: float) -> None:
        for request in requests_of(work.rows):
            if request.status is Status.WAITING:
                request.status = Status.RUNNING
                request.timings.queue_s = now - request.arrived_at
                self._observer.queue_wait(request.timings.queue_s)

    def account(self, work: Work[Row], started_at: float, ended_at: float) -> None:
        """Note what a call took, for those who ask and those who count on it."""
        seconds = ended_at - started_at
        busy_s = max(0.0, ended_at - max(started_at, self._last_call_ended_at))
        self._last_call_ended_at = max(ended_at, self._last_call_ended_at)
        self._num_calls += 1
        num_lanes = sum(row.num_lanes for row in work.rows)
        decoder = work.alike.decoder if work.kind is WorkKind.DECODE else ""
        self._observer.engine_call(work.kind, len(work.rows), num_lanes, seconds, busy_s, decoder)
        self._backlog.note_call(busy_s)
        self._pace.note(work, seconds)
        record = StageRecord(
            work.kind.value, started_at, seconds, self._num_calls, len(work.rows), num_lanes
        )
        for request in requests_of(work.rows):
            name = f"{work.kind}_s"
            setattr(request.timings, name, getattr(request.timings, name) + seconds)
            if request.records is not None:
                request.records.append(record)

    def deliver(self, work: Work[Row], now: float) -> None:
        """Post what a decode brought: previews of rows that go on, pixels of rows that are done."""
        done = set(self._scheduler.update(work))
        self._backlog.note_finished(sum(row.num_frames for row in done))
        for row in work.rows if work.kind is WorkKind.DECODE else ():
            if row.request.status is not Status.RUNNING:
                continue  # another row of the same request has failed
            if row.drawing.failure is not None:
                error = EngineFailure(row.drawing.failure, code="not_finite")
                self.fail(row.request, Status.FAILED, error, now)
                continue
            if row.drawing.canvas is not None:
                continue  # it has more tiles
            if row not in done:
                previews = row.drawing.previews
                event: Event = Preview(row.index, len(previews) - 1, previews[-1])
            else:
                assert row.drawing.pixels is not None, "a row is done when its pixels are there"
                event = Finished(row.index, row.drawing.pixels)
                row.request.num_finished += 1
            self._post(row.request, event)
            if row.request.num_finished == len(row.request.rows):
                self._resolve(row.request, Status.COMPLETED, None, now)

    # -- the end of a request ----------------------------------------------------------------

    def fail(self, request: Request, status: Status, error: ServiceError, now: float) -> None:
        """End a request without its images; nothing happens if it is resolved."""
        self._scheduler.remove(request.rows)
        self._resolve(request, status, error, now)

    def _resolve(
        self, request: Request, status: Status, error: ServiceError | None, now: float
    ) -> None:
        if request not in self.open:
            return
        self.open.remove(request)
        self._backlog.remove(request)
        request.status = status
        request.timings.total_s = now - request.arrived_at
        self._post(request, Resolved(error))


def requests_of(rows: Sequence[Row]) -> list[Request]:
    """The distinct requests of these rows, in their order."""
    return list(dict.fromkeys(row.request for row in rows))
