"""The engine threads: the one place where rows change.

    each:  take in what arrived ─▶ sweep (cancelled, expired) ─▶ schedule ─▶ engine call ─▶ update
           └────────────────────── one at a time ─────────────────────────┘  side by side

There is one for each call that the engine takes at a time. Handlers talk to them through `submit`
and a request's own `send`. Whatever happens here, every accepted request gets exactly one
`Resolved` event: on success, on an engine error (its rows only), on cancellation, on deadline, and
when the threads themselves end.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from engines.drawing.drawing import Drawing
from engines.errors import DeviceLost, OutOfMemory
from service.batching.backlog import Backlog
from service.batching.pace import Pace
from service.batching.request import (
    Event,
    Finished,
    Preview,
    Request,
    Resolved,
    Row,
    StageRecord,
    Status,
)
from service.batching.scheduler import Limits, Scheduler, Work, WorkKind
from service.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    NotReady,
    ServiceError,
)

logger = logging.getLogger("fourstep.loop")


class Runner(Protocol):
    """The engine calls the loop makes; `engines.drawing.runner.Runner` is the real one."""

    def encode_text(self, drawings: Sequence[Drawing]) -> None: ...
    def encode_image(self, drawings: Sequence[Drawing]) -> None: ...
    def denoise(self, drawings: Sequence[Drawing], before_run: Callable[[], None]) -> None: ...
    def decode(self, drawings: Sequence[Drawing]) -> None: ...


class Observer(Protocol):
    """Told of every engine call and every change of the two sets: `service.telemetry.metrics`."""

    def engine_call(
        self, kind: WorkKind, num_rows: int, num_lanes: int, seconds: float, busy_s: float
    ) -> None:
        """A call of ``seconds``, in ``busy_s`` of which no other call had been running already."""
        ...

    def rows(self, waiting: int, running: int) -> None: ...
    def queue_wait(self, seconds: float) -> None: ...


class EngineLoop:
    """Runs a scheduler's work on a runner, in ``num_threads`` threads of its own.

    ``max_waiting`` bounds the rows accepted and not finished; `service.batching.backlog` says who
    may still come in. An engine call that takes more than ``max_call_s`` makes the loop unhealthy:
    it is wedged. ``clock`` is in seconds and only its differences matter.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        observer: Observer,
        *,
        num_threads: int = 1,
        max_waiting: int = 256,
        max_call_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calls: dict[WorkKind, Callable[[Sequence[Drawing]], Any]] = {
            WorkKind.ENCODE_TEXT: runner.encode_text,
            WorkKind.ENCODE_IMAGE: runner.encode_image,
            WorkKind.DENOISE: functools.partial(runner.denoise, before_run=self._send_out),
            WorkKind.DECODE: runner.decode,
        }
        self._pace = Pace()
        self._scheduler: Scheduler[Row] = Scheduler(limits, self._pace)
        self._observer = observer
        self._max_call_s = max_call_s
        self.clock = clock
        # Whoever holds the lock may change all that follows; nobody does during an engine call.
        lock = threading.RLock()
        self._wakeup = threading.Condition(lock)  # there is something to do, or to stop for
        self._emptied = threading.Condition(lock)  # the last open request was resolved
        self._inbox: deque[Request] = deque()
        self._open: set[Request] = set()  # accepted and not resolved
        self._backlog = Backlog(max_waiting)
        self._accepting = False
        self._stopping = False
        self._calls_began_at: dict[int, float] = {}  # by thread
        self._num_wakeups = 0
        self._num_calls = 0  # engine calls that came back
        self._last_call_ended_at = 0.0
        self._outbox: deque[tuple[Request, Event]] = deque()
        self._sending = threading.Lock()  # one sends at a time, so that all stays in order
        self._threads = [
            threading.Thread(target=self._run, name=f"fourstep-engine-{index}", daemon=True)
            for index in range(num_threads)
        ]

    def start(self) -> None:
        self._accepting = True
        for thread in self._threads:
            thread.start()

    @property
    def healthy(self) -> bool:
        """Accepting work, with its threads alive and in no call that never ends."""
        alive = all(thread.is_alive() for thread in self._threads)
        return self._accepting and alive and not self.wedged

    @property
    def wedged(self) -> bool:
        """Whether an engine call has taken longer than any should."""
        began_at = min(list(self._calls_began_at.values()), default=None)
        return began_at is not None and self.clock() - began_at > self._max_call_s

    def close(self, drain_s: float = 0.0) -> None:
        """Refuse new work, finish what runs for up to ``drain_s`` seconds, end the threads."""
        with self._wakeup:
            self._accepting = False
            self._emptied.wait_for(lambda: not self._open, timeout=drain_s)
            self._stopping = True
            self._wake(len(self._threads))
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    @property
    def num_open(self) -> int:
        """Requests accepted and not resolved."""
        with self._wakeup:
            return len(self._open)

    # -- called by handlers, from any thread ------------------------------------------------

    def check(self, num_rows: int, tenant: str, priority: int, timeout_s: float) -> None:
        """Raise what `submit` would now, before the rows of a request are made."""
        with self._wakeup:
            self._check(num_rows, tenant, priority, timeout_s)

    def _check(self, num_rows: int, tenant: str, priority: int, left_s: float) -> None:
        if not self.healthy:
            raise NotReady("this replica does not accept work now; try again", retry_after_s=1)
        self._backlog.check(num_rows, tenant, priority, left_s)

    def submit(self, request: Request) -> None:
        """Accept a request. From here on it gets exactly one `Resolved` event.

        Raises:
            NotReady: the loop is starting, draining or dead.
            Overloaded: there is no room, or no time before its deadline; nothing was accepted.
        """
        with self._wakeup:
            left_s = request.deadline - self.clock()
            self._check(len(request.rows), request.tenant, request.priority, left_s)
            self._backlog.add(request)
            self._open.add(request)
            self._inbox.append(request)
            self._wake()

    def cancel(self, request: Request) -> None:
        """Free the request's rows at the next step boundary; nothing happens if it is resolved."""
        with self._wakeup:
            request.cancelled = True
            self._wake()

    def _wake(self, num_threads: int = 1) -> None:
        self._num_wakeups += 1
        self._wakeup.notify(num_threads)

    # -- the engine threads ------------------------------------------------------------------

    def _run(self) -> None:
        error: ServiceError = NotReady("this replica is shutting down; try again", retry_after_s=1)
        try:
            work = None
            while (work := self._next_work(after=work)) is not None:
                self._call(work, may_split=True)
        except BaseException:
            logger.exception("the engine loop died; every open request fails")
            error = EngineFailure("the engine of this replica stopped", retry_after_s=1)
        finally:
            with self._wakeup:
                self._accepting, self._stopping = False, True
                self._wake(len(self._threads))
                for request in list(self._open):
                    self._resolve(request, Status.FAILED, error)
            self._send_out()

    def _next_work(self, after: Work[Row] | None) -> Work[Row] | None:
        """The next call, slept for where there is none yet. None: the loop stops."""
        while True:
            with self._wakeup:
                if after is not None:
                    self._scheduler.release(after)
                    after = None
                work = None if self._stopping else self._choose()
                if work is not None or self._stopping:
                    return work
                seen = self._num_wakeups
            self._send_out()
            with self._wakeup:  # not to look around once more: who was sent to waits for this turn
                if seen == self._num_wakeups:
                    self._wakeup.wait()

    def _choose(self) -> Work[Row] | None:
        while self._inbox:
            self._scheduler.add(self._inbox.popleft().rows)
        self._sweep()
        work = self._scheduler.schedule()
        self._observer.rows(len(self._scheduler.waiting), len(self._scheduler.running))
        if work is not None:
            self._begin(work)
            if self._scheduler.has_more:
                self._wake()
        return work

    def _sweep(self) -> None:
        num_rows = len(self._scheduler.waiting) + len(self._scheduler.running)
        least_s = functools.partial(self._pace.least_s, num_rows=num_rows)
        for request in _requests(self._scheduler.sweep(self.clock(), least_s)):
            if request.cancelled:
                self._fail(request, Status.CANCELLED, Cancelled("the client closed the request"))
            else:
                error = DeadlineExceeded(
                    f"not finished within {request.deadline - request.arrived_at:g} s; ask for "
                    "fewer steps or images, or raise the deadline (X-Request-Timeout)"
                )
                self._fail(request, Status.EXPIRED, error)

    def _begin(self, work: Work[Row]) -> None:
        started_at = self.clock()
        for request in _requests(work.rows):
            if request.status is Status.WAITING:
                request.status = Status.RUNNING
                request.timings.queue_s = started_at - request.arrived_at
                self._observer.queue_wait(request.timings.queue_s)

    def _call(self, work: Work[Row], *, may_split: bool) -> None:
        """One engine call. Without memory for it, two of half as many rows; then it sheds."""
        if work.kind is not WorkKind.DENOISE:  # which does so itself, when its inputs are ready
            self._send_out()
        thread = threading.get_ident()
        self._calls_began_at[thread] = started_at = self.clock()
        try:
            self._calls[work.kind]([row.drawing for row in work.rows])
        except OutOfMemory as error:
            middle = len(work.rows) // 2
            if may_split and middle:
                logger.warning("%s of %d rows, now halved: %s", work.kind, len(work.rows), error)
                for rows in (work.rows[:middle], work.rows[middle:]):
                    alive = tuple(row for row in rows if row.request.status is Status.RUNNING)
                    if alive:
                        self._call(Work(work.kind, alive), may_split=False)
                return
            logger.exception("%s of %d rows shed", work.kind, len(work.rows))
            self._fail_all(work, _no_memory(error))
        except DeviceLost:
            raise  # and end the loop: all that follows would fail, and this replica be healthy
        except Exception as error:
            logger.exception("%s of %d rows failed", work.kind, len(work.rows))
            self._fail_all(work, _engine_failure(work.kind, error))
        else:
            ended_at = self.clock()
            with self._wakeup:
                self._account(work, started_at, ended_at)
                self._deliver(work)
        finally:
            self._calls_began_at.pop(thread, None)

    def _account(self, work: Work[Row], started_at: float, ended_at: float) -> None:
        """Note what a call took, for those who ask and those who count on it."""
        seconds = ended_at - started_at
        busy_s = max(0.0, ended_at - max(started_at, self._last_call_ended_at))
        self._last_call_ended_at = max(ended_at, self._last_call_ended_at)
        self._num_calls += 1
        num_lanes = sum(row.num_lanes for row in work.rows)
        self._observer.engine_call(work.kind, len(work.rows), num_lanes, seconds, busy_s)
        self._backlog.note_call(busy_s)
        self._pace.note(work.kind, work.rows[0].drawing.group, len(work.rows), seconds)
        for request in _requests(work.rows):
            name = f"{work.kind}_s"
            setattr(request.timings, name, getattr(request.timings, name) + seconds)
            if request.records is not None:
                request.records.append(
                    StageRecord(
                        work.kind.value,
                        started_at,
                        seconds,
                        self._num_calls,
                        len(work.rows),
                        num_lanes,
                    )
                )

    def _deliver(self, work: Work[Row]) -> None:
        """Send what a decode brought: previews of rows that go on, pixels of rows that are done."""
        done = set(self._scheduler.update(work))
        self._backlog.note_finished(len(done))
        for row in work.rows if work.kind is WorkKind.DECODE else ():
            if row.request.status is not Status.RUNNING:
                continue  # another row of the same request has failed
            if row.drawing.failure is not None:
                error = EngineFailure(row.drawing.failure, code="not_finite")
                self._fail(row.request, Status.FAILED, error)
                continue
            if row not in done:
                previews = row.drawing.previews
                event: Event = Preview(row.index, len(previews) - 1, previews[-1])
            else:
                assert row.drawing.pixels is not None, "a row is done when its pixels are there"
                event = Finished(row.index, row.drawing.pixels)
                row.request.num_finished += 1
            self._outbox.append((row.request, event))
            if row.request.num_finished == len(row.request.rows):
                self._resolve(row.request, Status.COMPLETED, None)

    def _fail_all(self, work: Work[Row], error: ServiceError) -> None:
        with self._wakeup:
            for request in _requests(work.rows):
                self._fail(request, Status.FAILED, error)

    def _fail(self, request: Request, status: Status, error: ServiceError) -> None:
        self._scheduler.remove(request.rows)
        self._resolve(request, status, error)

    def _resolve(self, request: Request, status: Status, error: ServiceError | None) -> None:
        if request not in self._open:
            return
        self._open.remove(request)
        self._backlog.remove(request)
        request.status = status
        request.timings.total_s = self.clock() - request.arrived_at
        self._outbox.append((request, Resolved(error)))
        if not self._open:
            self._emptied.notify_all()

    def _send_out(self) -> None:
        """Hand over the events since the last time: at the latest when the engine is next asked.

        Not sooner, for whoever receives them sets to work, and this thread has an engine waiting.
        """
        with self._sending:
            while self._outbox:
                request, event = self._outbox.popleft()
                request.send(event)


def _requests(rows: Sequence[Row]) -> list[Request]:
    """The distinct requests of these rows, in their order."""
    return list(dict.fromkeys(row.request for row in rows))


def _no_memory(error: OutOfMemory) -> NotReady:
    return NotReady(
        f"the engine has no memory for this ({error}); ask for a smaller size or fewer images, or "
        "try again when less is drawn",
        code="out_of_memory",
        retry_after_s=1,
    )


def _engine_failure(kind: WorkKind, error: Exception) -> EngineFailure:
    what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return EngineFailure(f"the engine failed in {kind}: {what}")
