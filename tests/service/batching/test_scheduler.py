"""Invariants of the scheduler, for any arrivals, cancellations and engine faults."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.drawing.stage import Stage
from service.batching.scheduler import Limits, Scheduler, Work, WorkKind
from service.batching.turns import CLIP_PATIENCE, LIVE_PATIENCE, SHARED_PATIENCE


@dataclass(eq=False)
class FakeRow:
    """A row without tensors: counts what was done to it."""

    num_steps: int
    size: int
    num_lanes: int = 1
    num_frames: int = 1
    needs_image: bool = False
    tenant: str = ""
    priority: int = 0
    deadline: float = float("inf")
    cancelled: bool = False
    live: bool = False
    decoder: str = "full"
    num_tiles: int = 1
    stage: Stage = Stage.ENCODE_TEXT
    num_steps_left: int = field(init=False)
    num_calls: dict[WorkKind, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_steps_left = self.num_steps

    @property
    def group(self) -> tuple[int, ...]:
        return (self.size, self.size, self.num_frames)

    @property
    def encoding(self) -> tuple[int, str]:
        return (self.size, self.decoder)

    @property
    def decoding(self) -> tuple[int, str]:
        return (self.size, self.decoder)

    def advance(self, kind: WorkKind) -> None:
        self.num_calls[kind] = self.num_calls.get(kind, 0) + 1
        if kind is WorkKind.ENCODE_TEXT:
            self.stage = Stage.ENCODE_IMAGE if self.needs_image else Stage.DENOISE
        elif kind is WorkKind.ENCODE_IMAGE:
            self.stage = Stage.DENOISE
        elif kind is WorkKind.DENOISE:
            self.num_steps_left -= 1
            self.stage = Stage.DENOISE if self.num_steps_left else Stage.DECODE
        elif self.num_calls[kind] == self.num_tiles:
            self.stage = Stage.DONE


@dataclass(frozen=True)
class FakeCosts:
    """The same for every size."""

    step: float
    decode_fixed: float
    step_fixed: float = 0.0

    def step_s(self, group: tuple[int, int]) -> float:
        return self.step

    def step_fixed_s(self, group: tuple[int, int]) -> float:
        return self.step_fixed

    def decode_fixed_s(self, decoding: tuple[int, str]) -> float:
        return self.decode_fixed


costs = st.one_of(
    st.none(),
    st.builds(FakeCosts, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    st.just(FakeCosts(0, 1)),
)
rows = st.builds(
    FakeRow,
    num_steps=st.integers(1, 8),
    size=st.sampled_from([64, 96]),
    num_lanes=st.integers(1, 2),
    num_frames=st.sampled_from([1, 1, 3, 16]),
    needs_image=st.booleans(),
    tenant=st.sampled_from(["", "alice", "bob"]),
    priority=st.integers(-1, 1),
    live=st.booleans(),
    decoder=st.sampled_from(["full", "tiny"]),
    num_tiles=st.integers(1, 4),
)
limits = st.builds(
    Limits,
    max_batch=st.integers(2, 8),
    max_decode_batch=st.integers(1, 4),
    max_running=st.integers(8, 24),
    patience=st.integers(0, 8),
    rows_that_fit=st.sampled_from([None, lambda group: 1 if group[0] == 96 else 3]),
    one_of_a_kind=st.booleans(),
)


def check_work(work: Work[FakeRow], scheduler: Scheduler[FakeRow]) -> None:
    assert work.rows
    assert len(set(map(id, work.rows))) == len(work.rows)
    if work.kind is WorkKind.DECODE:
        assert {row.decoding for row in work.rows} == {work.alike}
    elif work.kind is WorkKind.ENCODE_IMAGE:
        assert {row.encoding for row in work.rows} == {work.alike}
    elif work.kind is WorkKind.DENOISE:
        assert {row.group for row in work.rows} == {work.alike}
    if work.kind is WorkKind.DENOISE:
        assert sum(row.num_lanes for row in work.rows) <= scheduler.limits.max_batch
        pictures = sum(row.num_lanes * row.num_frames for row in work.rows)
        assert len(work.rows) == 1 or pictures <= scheduler.limits.max_batch
    elif work.kind is WorkKind.ENCODE_TEXT:
        assert len(work.rows) <= scheduler.limits.max_decode_batch
    else:
        assert len(work.rows) <= scheduler.limits.decode_rows(work.alike)
    assert sum(row.num_lanes for row in scheduler.running) <= scheduler.limits.max_running
    wanted = {
        WorkKind.ENCODE_TEXT: Stage.ENCODE_TEXT,
        WorkKind.ENCODE_IMAGE: Stage.ENCODE_IMAGE,
        WorkKind.DENOISE: Stage.DENOISE,
        WorkKind.DECODE: Stage.DECODE,
    }
    assert all(row.stage is wanted[work.kind] for row in work.rows)


def _step(scheduler: Scheduler[FakeRow]) -> Work[FakeRow]:
    """The next call, after it."""
    work = scheduler.schedule()
    assert work is not None
    for row in work.rows:
        row.advance(work.kind)
    scheduler.update(work)
    scheduler.release(work)
    return work


@settings(max_examples=200, deadline=None)
@given(
    limits=limits,
    costs=costs,
    max_calls=st.integers(1, 3),
    arrivals=st.lists(st.lists(rows, max_size=5), max_size=12),
    data=st.data(),
)
def test_every_row_leaves_exactly_once(
    limits: Limits,
    costs: FakeCosts | None,
    max_calls: int,
    arrivals: list[list[FakeRow]],
    data: st.DataObject,
) -> None:
    """Whatever is cancelled, expires or fails, and however many calls there are side by side."""
    scheduler: Scheduler[FakeRow] = Scheduler(limits, costs)
    left: list[FakeRow] = []
    calls: list[Work[FakeRow]] = []
    pending = list(arrivals)
    everyone = [row for group in arrivals for row in group]
    for now in range(10_000):
        if pending and (scheduler.idle or data.draw(st.booleans())):
            scheduler.add(pending.pop(0))
        if scheduler.running and data.draw(st.integers(0, 9)) == 0:
            victim = data.draw(st.sampled_from(scheduler.running))
            match data.draw(st.integers(0, 2)):
                case 0:
                    victim.cancelled = True
                case 1:
                    victim.deadline = now
                case 2:
                    scheduler.remove([victim])
                    left.append(victim)
        in_call = {row for call in calls for row in call.rows}
        gone = scheduler.sweep(now)
        assert not in_call.intersection(gone)
        left += gone
        work = scheduler.schedule() if len(calls) < max_calls else None
        if work is not None:
            check_work(work, scheduler)
            assert not (limits.one_of_a_kind and work.kind in {call.kind for call in calls})
            assert not any(row.cancelled or row.deadline <= now for row in work.rows)
            assert not in_call.intersection(work.rows)
            calls.append(work)
            if data.draw(st.booleans()):
                continue
        elif len(calls) < max_calls:
            assert not scheduler.has_more
        if calls:
            call = calls.pop(data.draw(st.integers(0, len(calls) - 1)))
            for row in call.rows:
                row.advance(call.kind)
            left += scheduler.update(call)
            scheduler.release(call)
        elif not pending:
            break
        else:
            assert scheduler.idle
    assert scheduler.idle
    assert sorted(map(id, left)) == sorted(map(id, everyone))
    for row in everyone:
        if row.stage is Stage.DONE:
            assert row.num_calls[WorkKind.DENOISE] == row.num_steps
            assert row.num_calls[WorkKind.DECODE] == row.num_tiles


@settings(max_examples=50, deadline=None)
@given(patience=st.integers(0, 8), num_steps=st.integers(2, 8), other=st.sampled_from([64, 96]))
def test_bounded_wait_under_a_flood_of_short_rows(
    patience: int, num_steps: int, other: int
) -> None:
    """One long row against newcomers at every call: the time it is overtaken is bounded."""
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(2, 1, 64, patience))
    patient = FakeRow(num_steps=num_steps, size=64)
    scheduler.add([patient])
    num_denoise_calls = 0
    while patient.stage is not Stage.DECODE:
        if num_denoise_calls < 500:
            scheduler.add([FakeRow(num_steps=1, size=other)])
        num_denoise_calls += _step(scheduler).kind is WorkKind.DENOISE
        assert num_denoise_calls <= 3 * (patience + 1) * num_steps + 3


@settings(max_examples=100, deadline=None)
@given(
    max_batch=st.integers(2, 8),
    crowd_steps=st.integers(1, 8),
    num_steps=st.integers(1, 8),
    num_guests=st.integers(1, 12),
    before=st.integers(0, 40),
)
def test_a_crowd_leaves_every_other_tenant_half_of_the_lanes(
    max_batch: int, crowd_steps: int, num_steps: int, num_guests: int, before: int
) -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(max_batch, 4, 1000))
    scheduler.add(FakeRow(crowd_steps, 64, tenant="crowd", stage=Stage.DENOISE) for _ in range(500))
    for _ in range(before):
        _step(scheduler)
    guests = [
        FakeRow(num_steps, 64, tenant="guest", stage=Stage.DENOISE) for _ in range(num_guests)
    ]
    scheduler.add(guests)
    num_calls = 0
    while any(row.stage is Stage.DENOISE for row in guests):
        num_calls += _step(scheduler).kind is WorkKind.DENOISE
    lanes = num_steps * num_guests
    assert num_calls <= 2 * lanes / max_batch + num_steps + 2


@settings(max_examples=50, deadline=None)
@given(num_steps=st.integers(1, 8), patience=st.integers(0, 8), before=st.integers(0, 20))
def test_an_urgent_row_is_in_every_call_from_its_first(
    num_steps: int, patience: int, before: int
) -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(2, 1, 1000, patience))
    scheduler.add(FakeRow(4, 64) for _ in range(50))
    for _ in range(before):
        _step(scheduler)
    urgent = FakeRow(num_steps, 96, priority=1)
    scheduler.add([urgent])
    calls = []
    while urgent.stage is not Stage.DONE:
        calls.append(_step(scheduler))
    without = [work.kind for work in calls if urgent not in work.rows]
    assert without.count(WorkKind.DENOISE) <= 1, "encoding lets the others step once"
    assert without.count(WorkKind.DECODE) <= num_steps + 1, "decoding takes turns with denoising"


def test_a_row_that_cannot_meet_its_deadline_leaves_before_it_passes() -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(2, 1, 8))
    late, early = FakeRow(4, 64, deadline=10.0), FakeRow(2, 64, deadline=10.0)
    scheduler.add([late, early])
    assert scheduler.sweep(7.0, lambda row: 1.0 * row.num_steps_left) == [late]
    assert scheduler.sweep(8.0, lambda row: 1.0 * row.num_steps_left) == [early]


def test_zero_patience_is_order_of_arrival() -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(2, 1, 8, patience=0))
    long, short = FakeRow(8, 64, num_lanes=2), FakeRow(1, 64, num_lanes=2)
    for row in (long, short):
        row.stage = Stage.DENOISE
    scheduler.add([long, short])
    work = scheduler.schedule()
    assert work is not None
    assert work.rows == (long,)


def test_decoding_and_denoising_take_turns() -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(4, 1, 16))
    finished = [FakeRow(1, 64, stage=Stage.DECODE) for _ in range(3)]
    scheduler.add([*finished, FakeRow(8, 64, stage=Stage.DENOISE)])
    kinds = [_step(scheduler).kind for _ in range(4)]
    assert kinds == [WorkKind.DECODE, WorkKind.DENOISE, WorkKind.DECODE, WorkKind.DENOISE]


def test_tiles_are_decoded_in_turn_with_what_is_done() -> None:
    """No row waits for more than one tile of another, nor they for an endless line of rows."""
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(64, 1, 64))
    large = FakeRow(1, 96, stage=Stage.DECODE, num_tiles=6)
    small = [FakeRow(steps, 64, stage=Stage.DENOISE) for steps in range(1, 41)]  # one a step
    scheduler.add([large, *small])
    num_tiles_seen = Counter[FakeRow]()  # while it could have been decoded
    while large.stage is Stage.DECODE:
        ready = [row for row in small if row.stage is Stage.DECODE]
        if _step(scheduler).rows == (large,):
            num_tiles_seen.update(ready)
    assert max(num_tiles_seen.values()) == 1
    assert sum(row.stage is Stage.DONE for row in small) < 20


def _finishing(scheduler: Scheduler[FakeRow], num_steps_left: list[int]) -> None:
    """Rows that have their prompts already, with these many steps left."""
    rows = [FakeRow(num_steps=steps, size=64, stage=Stage.DENOISE) for steps in num_steps_left]
    scheduler.add(rows)


@pytest.mark.parametrize(
    ("step", "decode_fixed", "crowd", "decoded"),
    [
        (0.020, 0.004, 20, [4, 4]),  # 4 ms for each of 22 rows against 20 ms for each of two
        (0.020, 0.001, 20, [2, 2, 2, 2]),  # a decode is too cheap to wait for
        (0.100, 0.004, 20, [2, 2, 2, 2]),  # a step is too long
        (0.020, 0.004, 2, [2, 2, 2, 2]),  # too few would gain by it
        (0.000, 0.000, 20, [2, 2, 2, 2]),  # nothing is known yet
    ],
)
def test_a_decode_waits_for_company_where_that_pays(
    step: float, decode_fixed: float, crowd: int, decoded: list[int]
) -> None:
    """Two rows end with each of the next four steps; a decode call takes four."""
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(8, 4), FakeCosts(step, decode_fixed))
    _finishing(scheduler, [1, 1, 2, 2, 3, 3, 4, 4] + [8] * crowd)
    found = []
    while sum(found) < 8:
        work = _step(scheduler)
        if work.kind is WorkKind.DECODE:
            found.append(len(work.rows))
    assert found == decoded


def test_a_decode_never_waits_for_the_less_urgent() -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(2, 4), FakeCosts(0.0, 1.0))
    urgent = FakeRow(num_steps=1, size=64, stage=Stage.DECODE, priority=1)
    scheduler.add([urgent])
    _finishing(scheduler, [1] * 20)
    assert _step(scheduler).rows == (urgent,)


@settings(max_examples=100, deadline=None)
@given(
    max_decode_batch=st.integers(1, 8), num_rows=st.integers(1, 40), decode_fixed=st.floats(0, 1e9)
)
def test_the_wait_for_company_is_bounded(
    max_decode_batch: int, num_rows: int, decode_fixed: float
) -> None:
    """Whatever a decode costs, and even if those it waited for are cancelled every time."""
    limits = Limits(2, max_decode_batch, 64)
    scheduler: Scheduler[FakeRow] = Scheduler(limits, FakeCosts(0.0, decode_fixed))
    ready = FakeRow(num_steps=1, size=64, stage=Stage.DECODE)
    scheduler.add([ready])
    _finishing(scheduler, [1] * num_rows)
    for num_calls in range(2 * max_decode_batch):
        work = _step(scheduler)
        if ready in work.rows:
            assert num_calls <= max_decode_batch
            return
        for row in work.rows:
            row.cancelled = True
        scheduler.sweep(0.0)
    raise AssertionError("never decoded")


def test_large_rows_are_decoded_a_few_at_a_time() -> None:
    """The default size bounds calls of small rows; large ones do not fit as many."""
    limits = Limits(8, 8, rows_that_fit=lambda group: 2 if group[0] == 96 else 8)
    for size, counts in ((96, [2, 2, 1]), (64, [5])):
        scheduler: Scheduler[FakeRow] = Scheduler(limits)
        scheduler.add([FakeRow(num_steps=1, size=size, stage=Stage.DECODE) for _ in range(5)])
        assert [len(_step(scheduler).rows) for _ in counts] == counts
        assert scheduler.idle


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch >= 2"):
        Limits(max_batch=1)


def test_calls_side_by_side_are_of_different_kinds_where_that_is_asked() -> None:
    """A decode beside a step; a second step waits, and its rows join the next batch."""
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(2, 4, 8, one_of_a_kind=True))
    finished, *going = [FakeRow(num_steps=steps, size=64) for steps in (1, 2, 2, 2)]
    scheduler.add([finished, *going])
    while finished.stage is not Stage.DECODE:
        _step(scheduler)
    decode, denoise = scheduler.schedule(), scheduler.schedule()
    assert decode is not None
    assert denoise is not None
    assert {decode.kind, denoise.kind} == {WorkKind.DECODE, WorkKind.DENOISE}
    assert not scheduler.has_more
    assert scheduler.schedule() is None
    failed = denoise.rows[0]
    scheduler.remove(denoise.rows)  # they failed, but their call is still under way
    assert scheduler.schedule() is None
    scheduler.release(denoise)
    after = scheduler.schedule()
    assert after is not None
    assert after.kind is WorkKind.DENOISE
    assert failed not in after.rows


def _live(num_steps: int) -> FakeRow:
    return FakeRow(num_steps, 64, stage=Stage.DENOISE, live=True)


@pytest.mark.parametrize("costs", [None, FakeCosts(step=1.0, decode_fixed=0.0, step_fixed=0.2)])
def test_a_live_row_gives_way_where_a_step_costs_by_the_row(costs: FakeCosts | None) -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(8, 4), costs)
    live, other = _live(2), FakeRow(4, 64, stage=Stage.DENOISE)
    scheduler.add([live])
    assert _step(scheduler).rows == (live,), "nobody else is here"
    scheduler.add([other])
    for _ in range(4 + 1):  # steps and its decode
        assert _step(scheduler).rows == (other,)
    assert _step(scheduler).rows == (live,)


def test_a_live_row_waits_for_no_call_that_it_could_not_join() -> None:
    """Beside a call of others there is none of live rows: it would share their cores."""
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(8, 4))
    scheduler.add([_live(2), FakeRow(4, 64, stage=Stage.DENOISE)])
    assert scheduler.schedule() is not None
    assert not scheduler.has_more
    assert scheduler.schedule() is None


@pytest.mark.parametrize(
    ("step_fixed", "patience"),
    [(0.0, LIVE_PATIENCE), (0.25, 14), (0.5, SHARED_PATIENCE), (0.9, SHARED_PATIENCE)],
)
def test_a_flood_meets_live_rows_in_one_call_of_some(step_fixed: float, patience: int) -> None:
    """Of however many sessions they are, and none of them waits for ever."""
    costs = FakeCosts(step=1.0, decode_fixed=0.0, step_fixed=step_fixed)
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(4, 4, 1000), costs)
    live = [_live(2) for _ in range(3)]
    scheduler.add([*live, *(FakeRow(8, 64, stage=Stage.DENOISE) for _ in range(200))])
    calls = []
    while any(row.stage is not Stage.DONE for row in live):
        calls.append(any(row.live for row in _step(scheduler).rows))
    at = [index for index, is_live in enumerate(calls) if is_live]
    apart = [later - before for before, later in itertools.pairwise(at)]
    assert at[0] == patience
    assert len(at) == 2 + 1, "their steps and their decode"
    assert all(patience < each <= patience + 2 for each in apart), apart


@pytest.mark.parametrize(("priority", "first"), [(-1, "live"), (0, "other"), (1, "other")])
def test_a_live_row_gives_way_to_none_that_is_less_urgent(priority: int, first: str) -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(2, 4))
    live = _live(1)
    scheduler.add([FakeRow(1, 96, stage=Stage.DENOISE, priority=priority), live])
    assert (live in _step(scheduler).rows) == (first == "live")


def denoised(scheduler: Scheduler[FakeRow], count: int) -> list[list[FakeRow]]:
    """The rows of the next denoise calls."""
    calls: list[list[FakeRow]] = []
    while len(calls) < count:
        work = _step(scheduler)
        if work.kind is WorkKind.DENOISE:
            calls.append(list(work.rows))
    return calls


def test_pictures_go_before_clips_but_for_one_call_in_so_many() -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(max_batch=4))
    clips = [FakeRow(3, 64, num_frames=16), FakeRow(9, 64, num_frames=16)]
    scheduler.add(clips)
    scheduler.add([FakeRow(200, 64) for _ in range(4)])
    calls = denoised(scheduler, 6 * (CLIP_PATIENCE + 1))
    turns = [index for index, rows in enumerate(calls) if rows[0].num_frames > 1]
    assert turns == [index * (CLIP_PATIENCE + 1) for index in range(6)]
    assert [calls[index] for index in turns[:3]] == [[clips[0]]] * 3  # one fills a call; shortest
    assert calls[turns[3]] == [clips[1]]
    assert all(len(rows) == 4 for index, rows in enumerate(calls) if index not in turns)


def test_clips_step_at_every_call_where_there_are_no_pictures() -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(max_batch=4))
    scheduler.add([FakeRow(4, 64, num_frames=16), FakeRow(4, 64, num_frames=2, num_lanes=1)])
    rows = [row for rows in denoised(scheduler, 8) for row in rows]
    assert [row.num_frames for row in rows] == [2] * 4 + [16] * 4


def test_a_clip_of_higher_priority_goes_before_pictures() -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits())
    scheduler.add([FakeRow(50, 64), FakeRow(3, 64, num_frames=16, priority=1)])
    assert [rows[0].num_frames for rows in denoised(scheduler, 5)] == [16, 16, 16, 1, 1]


def test_clips_leave_room_for_pictures() -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(max_batch=4, max_running=8))
    scheduler.add([FakeRow(100, 64, num_frames=16) for _ in range(20)])
    scheduler.add([FakeRow(1, 64) for _ in range(20)])
    denoised(scheduler, 1)
    assert Counter(row.num_frames for row in scheduler.running) == {16: 4, 1: 4}


def test_live_frames_of_many_tenants_leave_room_for_others() -> None:
    scheduler: Scheduler[FakeRow] = Scheduler(Limits(max_batch=4, max_running=8))
    scheduler.add([FakeRow(100, 64, live=True, tenant=f"draws {k}") for k in range(20)])
    scheduler.add([FakeRow(1, 64, tenant="asks") for _ in range(20)])
    denoised(scheduler, 1)
    assert Counter(row.live for row in scheduler.running) == {True: 4, False: 4}
