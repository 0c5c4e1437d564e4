"""The engine loop under faults: every accepted request resolves exactly once."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engines.drawing.drawing import Drawing
from engines.drawing.runner import Runner
from engines.errors import DeviceLost
from engines.order import Order
from service.batching.loop import EngineLoop
from service.batching.pace import TELLING
from service.batching.request import Event, Finished, Request, Resolved, Row, Status
from service.batching.scheduler import Limits
from service.errors import DeadlineExceeded, EngineFailure, NotReady, Overloaded
from service.telemetry.metrics import Metrics


class Gate:
    """A runner that waits at every denoise call until let through, and fails when told to."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.passes = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)  # released at every denoise call
        self.open = False
        self.poison: str | None = None
        self.lost: str | None = None  # the prompt at which the whole GPU goes
        self.clock = 0.0  # seconds; every denoise call takes one

    def encode_text(self, drawings: Sequence[Drawing]) -> None:
        self._runner.encode_text(drawings)

    def encode_image(self, drawings: Sequence[Drawing]) -> None:
        self._runner.encode_image(drawings)

    def denoise(self, drawings: Sequence[Drawing], before_run: Callable[[], None]) -> None:
        before_run()
        self.entered.release()
        if not self.open:
            self.passes.acquire()
        if any(drawing.recipe.prompt == self.poison for drawing in drawings):
            raise RuntimeError("device lost")
        if any(drawing.recipe.prompt == self.lost for drawing in drawings):
            raise DeviceLost("the GPU is lost")
        self._runner.denoise(drawings)
        self.clock += 1.0

    def decode(self, drawings: Sequence[Drawing]) -> None:
        self._runner.decode(drawings)


@pytest.fixture(scope="module")
def runner(lcm_checkpoint: Path, cache_dir: Path) -> Runner:
    return Runner.open(Order(str(lcm_checkpoint), backend="onnxruntime", cache_dir=cache_dir))


@pytest.fixture
def gate(runner: Runner) -> Gate:
    return Gate(runner)


@pytest.fixture
def loop(gate: Gate) -> Iterator[EngineLoop]:
    loop = EngineLoop(gate, Limits(max_batch=2), Metrics("test"), max_waiting=4)
    loop.start()
    yield loop
    gate.open = True
    gate.passes.release()
    loop.close()


@pytest.fixture
def wide_loop(gate: Gate) -> Iterator[EngineLoop]:
    """One that has two calls side by side, of two rows each."""
    loop = EngineLoop(gate, Limits(max_batch=2), Metrics("test"), num_threads=2, max_waiting=1000)
    loop.start()
    yield loop
    gate.open = True
    gate.passes.release(2)
    loop.close()


@pytest.fixture
def timed_loop(gate: Gate, runner: Runner) -> Iterator[EngineLoop]:
    """One that has seen rows of two steps take two seconds each."""
    limits = Limits(max_batch=2)
    loop = EngineLoop(gate, limits, Metrics("test"), max_waiting=8, clock=lambda: gate.clock)
    loop.start()
    for _ in range(TELLING // 2):
        request, events = make_request(loop, runner, "x")
        loop.submit(request)
        gate.passes.release(2)
        assert last(events).error is None
    yield loop
    gate.open = True
    gate.passes.release()
    loop.close()


def make_request(
    loop: EngineLoop,
    runner: Runner,
    prompt: str,
    *,
    num_images: int = 1,
    timeout_s: float = 60.0,
    tenant: str = "",
    priority: int = 0,
    num_steps: int = 2,
) -> tuple[Request, queue.Queue[Event]]:
    events: queue.Queue[Event] = queue.Queue()
    now = loop.clock()
    request = Request(
        prompt,
        arrived_at=now,
        deadline=now + timeout_s,
        send=events.put,
        tenant=tenant,
        priority=priority,
    )
    request.rows = [
        Row(request, k, runner.start(runner.default_recipe(k, prompt, num_steps=num_steps)))
        for k in range(num_images)
    ]
    return request, events


def last(events: queue.Queue[Event]) -> Resolved:
    while not isinstance(event := events.get(timeout=30), Resolved):
        pass
    assert events.empty(), "nothing follows Resolved"
    return event


def test_images_then_resolved(loop: EngineLoop, gate: Gate, runner: Runner) -> None:
    gate.open = True
    request, events = make_request(loop, runner, "x", num_images=3)
    loop.submit(request)
    kinds = [type(events.get(timeout=30)) for _ in range(4)]
    assert kinds == [Finished, Finished, Finished, Resolved]
    assert request.status is Status.COMPLETED
    assert request.timings.total_s >= request.timings.denoise_s > 0


def test_overload_is_refused_and_accepts_nothing(
    loop: EngineLoop, gate: Gate, runner: Runner
) -> None:
    first, first_events = make_request(loop, runner, "first", num_images=3)
    loop.submit(first)
    second, second_events = make_request(loop, runner, "second", num_images=2)
    with pytest.raises(Overloaded, match="at most 4"):
        loop.submit(second)
    gate.open = True
    gate.passes.release()
    assert last(first_events).error is None
    assert second_events.empty()


def test_a_fault_fails_its_rows_only(loop: EngineLoop, gate: Gate, runner: Runner) -> None:
    gate.open, gate.poison = True, "poison"
    bad, bad_events = make_request(loop, runner, "poison")
    loop.submit(bad)
    assert isinstance(last(bad_events).error, EngineFailure)
    good, good_events = make_request(loop, runner, "good")
    loop.submit(good)
    assert last(good_events).error is None


def test_cancel_frees_rows_and_nothing_is_decoded(
    loop: EngineLoop, gate: Gate, runner: Runner
) -> None:
    request, events = make_request(loop, runner, "x")
    loop.submit(request)
    loop.cancel(request)
    gate.passes.release()
    assert last(events).error is not None
    assert request.status is Status.CANCELLED
    assert request.rows[0].drawing.pixels is None


@pytest.mark.parametrize(("num_done", "status"), [(1, Status.CANCELLED), (2, Status.COMPLETED)])
def test_what_is_superseded_stays_when_half_of_it_is_done(
    loop: EngineLoop, gate: Gate, runner: Runner, num_done: int, status: Status
) -> None:
    """Superseded in the call that makes it so many steps of four."""
    request, events = make_request(loop, runner, "x", num_steps=4)
    loop.submit(request)
    assert gate.entered.acquire(timeout=30)
    for _ in range(num_done - 1):
        gate.passes.release()
        assert gate.entered.acquire(timeout=30)
    loop.supersede(request)
    gate.open = True
    gate.passes.release()
    last(events)
    assert request.status is status
    assert request.rows[0].drawing.step_index == (num_done if status is Status.CANCELLED else 4)


def test_deadline(loop: EngineLoop, runner: Runner) -> None:
    request, events = make_request(loop, runner, "x", timeout_s=0.0)
    loop.submit(request)
    assert isinstance(last(events).error, DeadlineExceeded)
    assert request.rows[0].drawing.step_index == 0, "an expired row costs no denoise call"


def test_a_request_without_time_is_refused_with_the_time_to_come_back(
    timed_loop: EngineLoop, runner: Runner
) -> None:
    crowd, _ = make_request(timed_loop, runner, "crowd", num_images=3)
    timed_loop.submit(crowd)
    hasty, _ = make_request(timed_loop, runner, "hasty", timeout_s=5.0)
    with pytest.raises(
        Overloaded, match=r"3 images go before .* about 8\.0 s .* has 5\.0 s"
    ) as error:
        timed_loop.submit(hasty)
    assert error.value.retry_after_s == pytest.approx(3.5)  # of 5 s, 0.5 are for the answer
    urgent, _ = make_request(timed_loop, runner, "urgent", timeout_s=5.0, priority=1)
    timed_loop.submit(urgent)
    patient, _ = make_request(timed_loop, runner, "patient", timeout_s=11.5)
    timed_loop.submit(patient)


def test_a_request_that_cannot_be_finished_in_time_costs_no_call(
    timed_loop: EngineLoop, gate: Gate, runner: Runner
) -> None:
    begun = gate.clock
    request, events = make_request(timed_loop, runner, "x", timeout_s=1.5)  # its steps take 2 s
    timed_loop.submit(request)
    assert isinstance(last(events).error, DeadlineExceeded)
    assert gate.clock == begun


def test_one_tenant_leaves_room_for_another(timed_loop: EngineLoop, runner: Runner) -> None:
    for _ in range(4):
        timed_loop.submit(make_request(timed_loop, runner, "x", tenant="crowd")[0])
    with pytest.raises(Overloaded, match=r"4 images .* 4 of them of this API key, of at most 8"):
        timed_loop.submit(make_request(timed_loop, runner, "x", tenant="crowd")[0])
    guest, _ = make_request(timed_loop, runner, "x", tenant="guest", timeout_s=5.0)
    timed_loop.submit(guest)  # in turns: no more of the crowd's rows go before it than it has
    assert len(timed_loop._ledger.open) == 5


def test_close_drains_then_refuses(gate: Gate, runner: Runner) -> None:
    loop = EngineLoop(gate, Limits(max_batch=2), Metrics("test"))
    loop.start()
    gate.open = True
    request, events = make_request(loop, runner, "x", num_images=3)
    loop.submit(request)
    loop.close(drain_s=30)
    assert last(events).error is None
    late, _ = make_request(loop, runner, "late")
    with pytest.raises(NotReady):
        loop.submit(late)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_lost_device_ends_the_loop_and_answers_everyone(
    num_threads: int, gate: Gate, runner: Runner
) -> None:
    """Not the one batch alone: all that follow would fail, in a replica that seems healthy."""
    loop = EngineLoop(gate, Limits(max_batch=2), Metrics("test"), num_threads=num_threads)
    loop.start()
    gate.open, gate.lost = True, "x"
    both = [make_request(loop, runner, prompt, num_images=3) for prompt in ("a", "x")]
    with loop._wakeup:  # both are there before the first call
        for request, _ in both:
            loop.submit(request)
    events = both[1][1]
    assert isinstance(last(events).error, EngineFailure)
    for thread in loop._threads:
        thread.join(30)
    assert last(both[0][1]) is not None
    assert not loop.healthy
    assert not loop._ledger.open
    with pytest.raises(NotReady):
        loop.submit(make_request(loop, runner, "later")[0])
    loop.close()


def test_a_dead_loop_resolves_everyone(gate: Gate, runner: Runner) -> None:
    class Broken(Metrics):
        def engine_call(self, *_: object) -> None:
            raise SystemError("a bug outside the engine")

    loop = EngineLoop(gate, Limits(max_batch=2), Broken("test"))
    loop.start()
    gate.open = True
    request, events = make_request(loop, runner, "x")
    loop.submit(request)
    assert isinstance(last(events).error, EngineFailure)
    assert not loop.healthy


def _both_in_a_call(
    wide_loop: EngineLoop, gate: Gate, runner: Runner, prompts: tuple[str, str]
) -> list[tuple[Request, queue.Queue[Event]]]:
    """Two requests of two images, each in a denoise call of its own at the same time."""
    made = []
    for prompt in prompts:
        made.append(make_request(wide_loop, runner, prompt, num_images=2))
        wide_loop.submit(made[-1][0])
        assert gate.entered.acquire(timeout=30)
    return made


def test_a_call_begins_while_another_runs(
    wide_loop: EngineLoop, gate: Gate, runner: Runner
) -> None:
    (_, first), (_, second) = _both_in_a_call(wide_loop, gate, runner, ("first", "second"))
    gate.open = True
    gate.passes.release(2)
    assert last(first).error is None
    assert last(second).error is None


def test_a_fault_spares_the_call_beside_it(
    wide_loop: EngineLoop, gate: Gate, runner: Runner
) -> None:
    gate.poison = "poison"
    (_, bad), (_, good) = _both_in_a_call(wide_loop, gate, runner, ("poison", "good"))
    gate.open = True
    gate.passes.release(2)
    assert isinstance(last(bad).error, EngineFailure)
    assert last(good).error is None


def test_a_request_cancelled_in_a_call_leaves_at_its_end(
    wide_loop: EngineLoop, gate: Gate, runner: Runner
) -> None:
    (gone, gone_events), (_, events) = _both_in_a_call(wide_loop, gate, runner, ("gone", "stays"))
    wide_loop.cancel(gone)
    assert gone_events.empty()
    gate.open = True
    gate.passes.release(2)
    assert last(events).error is None
    assert last(gone_events).error is not None
    assert gone.status is Status.CANCELLED
    assert gone.rows[0].drawing.step_index == 1


def test_a_request_with_rows_in_two_calls_fails_once(
    wide_loop: EngineLoop, gate: Gate, runner: Runner
) -> None:
    request, events = make_request(wide_loop, runner, "poison", num_images=4)
    gate.poison = "poison"
    wide_loop.submit(request)
    for _ in range(2):
        assert gate.entered.acquire(timeout=30)
    gate.passes.release(2)
    assert isinstance(last(events).error, EngineFailure)
    gate.open = True
    after, after_events = make_request(wide_loop, runner, "after")
    wide_loop.submit(after)
    assert last(after_events).error is None
    assert events.empty(), "nothing follows Resolved"


def test_everyone_is_answered_once_by_two_threads(
    wide_loop: EngineLoop, gate: Gate, runner: Runner
) -> None:
    gate.open, gate.poison = True, "poison"
    made = []
    for index in range(120):
        prompt = "poison" if index % 7 == 0 else f"a {index % 5}"
        timeout_s = 0.01 if index % 11 == 0 else 60.0
        request = make_request(
            wide_loop, runner, prompt, num_images=1 + index % 3, timeout_s=timeout_s
        )
        with contextlib.suppress(Overloaded):  # a slow machine knows by now what a row costs
            wide_loop.submit(request[0])
            made.append(request)
        if index % 13 == 0:
            wide_loop.cancel(made[len(made) // 2][0])
    for request, events in made:
        kinds = []
        while not kinds or kinds[-1] is not Resolved:
            kinds.append(type(events.get(timeout=60)))
        assert events.empty(), "nothing follows Resolved"
        if request.status is Status.COMPLETED:
            assert kinds == [Finished] * len(request.rows) + [Resolved]
    assert not wide_loop._ledger.open
    assert {request.status for request, _ in made} >= {Status.COMPLETED, Status.FAILED}


def test_busy_time_counts_what_overlaps_once(gate: Gate, runner: Runner) -> None:
    calls: list[tuple[float, float]] = []

    class Listener(Metrics):
        def engine_call(self, *values: Any) -> None:
            calls.append(values[3:5])

    now = iter(range(10_000))
    loop = EngineLoop(
        gate, Limits(max_batch=2), Listener("test"), num_threads=2, clock=lambda: float(next(now))
    )
    loop.start()
    for _, events in _both_in_a_call(loop, gate, runner, ("one", "two")):
        gate.open = True
        gate.passes.release(2)
        assert last(events).error is None
    loop.close()
    assert all(0 <= busy_s <= seconds for seconds, busy_s in calls)
    assert sum(busy_s for _, busy_s in calls) <= next(now)
    assert sum(seconds for seconds, _ in calls) > sum(busy_s for _, busy_s in calls)
