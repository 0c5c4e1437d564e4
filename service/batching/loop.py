"""The engine threads: the one place where rows change.

    each:  take in what arrived ─▶ sweep (cancelled, expired) ─▶ schedule ─▶ engine call ─▶ update
           └────────────────────── one at a time ─────────────────────────┘  side by side

There is one for each call that the engine takes at a time. Handlers talk to them through `submit`
and a request's own `send`. Whatever happens here, every accepted request gets exactly one
`Resolved` event: on success, on an engine error (its rows only), on cancellation, on deadline, and
when the threads themselves end.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from engines.drawing.drawing import Drawing
from engines.errors import DeviceLost, OutOfMemory
from service.batching.ledger import Ledger, Observer, requests_of
from service.batching.outbox import Outbox
from service.batching.request import Kind, Request, Row, Status
from service.batching.scheduler import Limits, Work, WorkKind
from service.errors import OUT_OF_MEMORY, EngineFailure, NotReady, ServiceError

logger = logging.getLogger("fourstep.loop")


class Runner(Protocol):
    """The engine calls the loop makes; `engines.drawing.runner.Runner` is the real one."""

    def encode_text(self, drawings: Sequence[Drawing]) -> None: ...
    def encode_image(self, drawings: Sequence[Drawing]) -> None: ...
    def denoise(self, drawings: Sequence[Drawing], before_run: Callable[[], None]) -> None: ...
    def decode(self, drawings: Sequence[Drawing]) -> None: ...


class EngineLoop:
    """Runs what a `Ledger` chooses on a runner, in ``num_threads`` threads of its own.

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
        self._outbox = Outbox()
        self._calls: dict[WorkKind, Callable[[Sequence[Drawing]], Any]] = {
            WorkKind.ENCODE_TEXT: runner.encode_text,
            WorkKind.ENCODE_IMAGE: runner.encode_image,
            WorkKind.DENOISE: functools.partial(runner.denoise, before_run=self._outbox.send_out),
            WorkKind.DECODE: runner.decode,
        }
        self._max_call_s = max_call_s
        self.clock = clock
        # Whoever holds the lock may change all that follows; nobody does during an engine call.
        lock = threading.RLock()
        self._wakeup = threading.Condition(lock)  # there is something to do, or to stop for
        self._emptied = threading.Condition(lock)  # the last open request was resolved
        self._ledger = Ledger(limits, observer, max_waiting, self._outbox.post)
        self._accepting = False
        self._stopping = False
        self._calls_began_at: dict[int, float] = {}  # by thread
        self._num_wakeups = 0
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
            self._emptied.wait_for(lambda: not self._ledger.open, timeout=drain_s)
            self._stopping = True
            self._wake(len(self._threads))
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    # -- called by handlers, from any thread ------------------------------------------------

    def check(self, num_images: int, kind: Kind, timeout_s: float) -> None:
        """Raise what `submit` would now, before the rows of a request are made; of a clip its
        frames are its images.
        """
        with self._wakeup:
            self._check(num_images, kind, timeout_s)

    def _check(self, num_images: int, kind: Kind, left_s: float) -> None:
        if not self.healthy:
            raise NotReady("this replica does not accept work now; try again", retry_after_s=1)
        self._ledger.check(num_images, kind, left_s)

    def submit(self, request: Request) -> None:
        """Accept a request. From here on it gets exactly one `Resolved` event.

        Raises:
            NotReady: the loop is starting, draining or dead.
            Overloaded: there is no room, or no time before its deadline; nothing was accepted.
        """
        with self._wakeup:
            self._check(request.num_images, request.kind, request.deadline - self.clock())
            self._ledger.accept(request)
            self._wake()

    def cancel(self, request: Request) -> None:
        """Free the request's rows at the next step boundary; nothing happens if it is resolved."""
        with self._wakeup:
            request.cancelled = True
            self._wake()

    def supersede(self, request: Request) -> None:
        """A newer one waits for it: `cancel` it, unless half of its steps are done."""
        with self._wakeup:
            request.superseded = True
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
                for request in list(self._ledger.open):
                    self._ledger.fail(request, Status.FAILED, error, self.clock())
                self._emptied.notify_all()
            self._outbox.send_out()

    def _next_work(self, after: Work[Row] | None) -> Work[Row] | None:
        """The next call, slept for where there is none yet. None: the loop stops."""
        while True:
            with self._wakeup:
                if after is not None:
                    self._ledger.release(after)
                    after = None
                work = None if self._stopping else self._choose()
                if work is not None or self._stopping:
                    return work
                seen = self._num_wakeups
            self._outbox.send_out()
            with self._wakeup:  # not to look around once more: who was sent to waits for this turn
                if seen == self._num_wakeups:
                    self._wakeup.wait()

    def _choose(self) -> Work[Row] | None:
        work = self._ledger.choose(self.clock())
        self._note_if_empty()
        if work is not None and self._ledger.has_more:
            self._wake()
        return work

    def _note_if_empty(self) -> None:
        if not self._ledger.open:
            self._emptied.notify_all()

    def _call(self, work: Work[Row], *, may_split: bool) -> None:
        """One engine call. Without memory for it, two of half as many rows; then it sheds."""
        if work.kind is not WorkKind.DENOISE:  # which does so itself, when its inputs are ready
            self._outbox.send_out()
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
                        self._call(dataclasses.replace(work, rows=alive), may_split=False)
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
                self._ledger.account(work, started_at, ended_at)
                self._ledger.deliver(work, ended_at)
                self._note_if_empty()
        finally:
            self._calls_began_at.pop(thread, None)

    def _fail_all(self, work: Work[Row], error: ServiceError) -> None:
        with self._wakeup:
            for request in requests_of(work.rows):
                self._ledger.fail(request, Status.FAILED, error, self.clock())
            self._note_if_empty()


def _no_memory(error: OutOfMemory) -> NotReady:
    return NotReady(
        f"the engine has no memory for this ({error}); ask for a smaller size or fewer images, or "
        "try again when less is drawn",
        code=OUT_OF_MEMORY,
        retry_after_s=1,
    )


def _engine_failure(kind: WorkKind, error: Exception) -> EngineFailure:
    what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return EngineFailure(f"the engine failed in {kind}: {what}")
