"""Chooses the next engine call. Pure: no tensors, no threads, no clock (time is passed in).

Rows wait in order of arrival and are admitted while there are lanes for them; admitted rows run.
Before every engine call the batch is formed anew, so rows join and leave at step boundaries:

    waiting ──admit──▶ running:  encode text/image ─▶ denoise × steps (previews between) ─▶ decode
                                        └──────── one schedule() call = one Work ────────┘

Who goes first is decided three times over. A row of higher priority goes before every lower one.
Among equals the tenants take turns: each is served in proportion to nothing but its presence, so
that whoever sends a hundred rows waits for their own. Among a tenant's rows those with the fewest
steps left step next, where every ``patience`` denoise calls that a row has been waiting count as
one step less. A short draft passes a long final, but only for a bounded time: a row of s steps is
never overtaken by a tenant's own that arrived more than ``patience · s`` denoise calls after it,
whatever its size. Simulated (`python -m loadtests simulate`'s engines, steps 1, 2, 4, 8, two sizes,
50 to 85 % load) patience 4 against order of arrival: p50 0.69 to 0.94 of it, p95 0.99 to 1.10,
p99 1.06 to 1.19.

Pictures go before clips of their priority, but for a call now and then (`service.batching.turns`).
A clip's step counts as many as it has frames, in its tenant's turn, its rank and its batch.

Rows of live sessions give way: they run while no other row of their priority or above is here, and
beside such in a call now and then.
"""

from __future__ import annotations

import enum
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from engines.drawing.stage import Stage
from service.batching.turns import Turns, admissible, pictures_of


class Schedulable(Protocol):
    """What the scheduler reads of a row; see `service.batching.request.Row`."""

    @property
    def stage(self) -> Stage: ...
    @property
    def group(self) -> Hashable: ...
    @property
    def encoding(self) -> Hashable: ...
    @property
    def decoding(self) -> Hashable: ...
    @property
    def num_lanes(self) -> int: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def num_steps_left(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def deadline(self) -> float: ...
    @property
    def cancelled(self) -> bool: ...
    @property
    def live(self) -> bool: ...


R = TypeVar("R", bound=Schedulable)


class WorkKind(enum.StrEnum):
    """The four engine calls there are."""

    ENCODE_TEXT = "encode_text"
    ENCODE_IMAGE = "encode_image"
    DENOISE = "denoise"
    DECODE = "decode"


DECODED = (Stage.PREVIEW, Stage.DECODE)
KIND_OF_STAGE = {
    Stage.ENCODE_TEXT: WorkKind.ENCODE_TEXT,
    Stage.ENCODE_IMAGE: WorkKind.ENCODE_IMAGE,
    Stage.DENOISE: WorkKind.DENOISE,
    Stage.PREVIEW: WorkKind.DECODE,
    Stage.DECODE: WorkKind.DECODE,
}


@dataclass(frozen=True, slots=True)
class Work(Generic[R]):
    """Rows run together in one engine call. A view for one step, thrown away after it."""

    kind: WorkKind
    rows: tuple[R, ...]
    alike: Any = None  # what they have in common: a group, an encoding or a decoding


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the batches.

    ``max_batch`` lanes share a denoise call (guidance without an embedding takes two lanes a row;
    of clips each frame counts, and one clip may always go);
    ``max_decode_batch`` rows share a decode, so that decoding never stalls the others for longer
    than one chunk; ``max_running`` lanes are in flight at once over all sizes. ``patience`` is the
    number of denoise calls that weigh as much as one step left; 0 means strict order of arrival.
    ``rows_that_fit`` bounds decodes, and encodings of images, of rows that are large.
    With ``one_of_a_kind`` calls side by side are of different kinds: those of one kind would stand
    in one line before a GPU, where a larger batch is better off.
    """

    max_batch: int = 8
    max_decode_batch: int = 4
    max_running: int = 64
    patience: int = 4  # simulated 1–64: beyond 4 the p99 grows faster than the p50 falls
    rows_that_fit: Callable[[Any], int] | None = None
    one_of_a_kind: bool = False

    def __post_init__(self) -> None:
        if self.max_batch < 2 or self.max_decode_batch < 1 or self.max_running < self.max_batch:
            raise ValueError(
                "limits: max_batch >= 2 (a guided row takes two lanes), max_decode_batch >= 1, "
                f"max_running >= max_batch; got {self}"
            )

    def decode_rows(self, alike: Any) -> int:
        """The most rows of an encoding, or of a decoding, that share a call of the VAE."""
        fitting = self.rows_that_fit(alike) if self.rows_that_fit else self.max_decode_batch
        return min(self.max_decode_batch, fitting)


class Costs(Protocol):
    """What calls for rows of a group, or decoded alike, take in seconds; 0 where not known."""

    def step_s(self, group: Any) -> float:
        """A full denoise call."""
        ...

    def step_fixed_s(self, group: Any) -> float:
        """The part of a denoise call that does not depend on its rows."""
        ...

    def decode_fixed_s(self, decoding: Any) -> float:
        """The part of a decode call that does not depend on its rows."""
        ...


class Scheduler(Generic[R]):
    """Step-level continuous batching over one engine. Without ``costs`` no decode ever waits.

    What a call has done to rows comes back by `update`, and every `Work` by `release` when nothing
    of it is under way any more. Until then its rows are not ready, and a further `schedule` is
    about the others, for a call beside it.
    """

    def __init__(self, limits: Limits, costs: Costs | None = None) -> None:
        self.limits = limits
        self._costs = costs
        self.waiting: list[R] = []  # in order of arrival
        self.running: list[R] = []  # in order of admission
        self._in_call: set[R] = set()
        self._calls: Counter[WorkKind] = Counter()  # under way
        self._arrivals: dict[R, int] = {}  # row → number of denoise calls before it came
        self._places: dict[R, int] = {}  # in the line for decodes, of those that came to it
        self._next_place = itertools.count(1)
        self._served: Counter[str] = Counter()  # tenant with rows here → lanes stepped, see _join
        self._num_denoise_calls = 0
        self._turns = Turns()
        self._num_running_lanes = 0
        self._encoded_last = False
        self._decoded_last = False
        self._num_decodes_put_off = 0  # since the last one

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def has_more(self) -> bool:
        """Whether the last `schedule` left rows for another call beside that one."""
        return bool(self._startable())

    def add(self, rows: Iterable[R]) -> None:
        """Put rows at the end of the line."""
        for row in rows:
            self._join(row.tenant)
            self._arrivals[row] = self._num_denoise_calls
            self.waiting.append(row)

    def _join(self, tenant: str) -> None:
        """A tenant that comes, or comes back, starts level with the one served least.

        So it neither catches up on what it did not ask for, nor pays for having been alone.
        """
        if tenant not in self._served:
            self._served[tenant] = min(self._served.values(), default=0)

    def sweep(self, now: float, least_s: Callable[[R], float] = lambda row: 0.0) -> list[R]:
        """Take out the rows that were cancelled and those that cannot meet their deadline any more.

        ``least_s`` is the time that a row needs at the very least. Rows in a call stay.
        """
        rows = itertools.chain(self._ready(), self.waiting)
        gone = [row for row in rows if row.cancelled or row.deadline <= now + least_s(row)]
        self.remove(gone)
        return gone

    def remove(self, rows: Sequence[R]) -> None:
        """Forget rows, wherever they are; unknown ones are ignored."""
        gone = {row for row in rows if self._arrivals.pop(row, None) is not None}
        if gone:
            self.waiting = [row for row in self.waiting if row not in gone]
            self.running = [row for row in self.running if row not in gone]
            self._in_call -= gone
            for row in gone:
                self._places.pop(row, None)
            self._num_running_lanes = sum(row.num_lanes for row in self.running)
            present = {row.tenant for row in self._arrivals}
            self._served = Counter({t: n for t, n in self._served.items() if t in present})

    def schedule(self) -> Work[R] | None:
        """The next engine call, or None where there is nothing to do but wait for other calls.

        Encoding comes first: it is cheap and lets a row join the very next step; but never twice
        in a row while others could go on, so that a flood of arrivals stops nobody. Decoding and
        denoising take turns: a finished row is never kept behind more than one step of the
        others, nor are the steps kept behind more than one chunk of decoding; unless it is worth
        the wait, see `_pays_to_wait`.
        """
        self._admit()
        ready = self._startable()
        choices = (self._encode, self._decode_or_denoise)
        work = None
        for choose in reversed(choices) if self._encoded_last else choices:
            work = work or choose(ready)
        if work is not None:
            self._calls[work.kind] += 1
            self._in_call.update(work.rows)
            self._encoded_last = work.kind in (WorkKind.ENCODE_TEXT, WorkKind.ENCODE_IMAGE)
            if not self._encoded_last:
                self._decoded_last = work.kind is WorkKind.DECODE
                self._num_decodes_put_off *= not self._decoded_last
            if work.kind is WorkKind.DENOISE:
                self._num_denoise_calls += 1
            self._turns.note(work.rows, denoise=work.kind is WorkKind.DENOISE)
        return work

    def update(self, work: Work[R]) -> list[R]:
        """After the engine call: rows that are done leave and are returned, but removed ones.

        A row that is decoded in tiles is at the end of the line for decodes after each of them.
        """
        self._in_call.difference_update(work.rows)
        for row in work.rows:
            if row.stage in DECODED and row in self._arrivals:
                self._places[row] = next(self._next_place)
        done = [row for row in work.rows if row.stage is Stage.DONE and row in self._arrivals]
        self.remove(done)
        return done

    def release(self, work: Work[R]) -> None:
        """What `schedule` gave is over, however it went: another call of its kind may start."""
        self._calls[work.kind] -= 1

    def _startable(self) -> list[R]:
        """The rows that another call may have now."""
        return [
            row
            for row in self._ready()
            if self._may_start(KIND_OF_STAGE[row.stage]) and not self._gives_way(row)
        ]

    def _may_start(self, kind: WorkKind) -> bool:
        return not (self.limits.one_of_a_kind and self._calls[kind])

    def _gives_way(self, row: R) -> bool:
        """Whether a row stays out of calls that rows of others are, or will be, in."""
        if not row.live or self._turns.is_live(self._shared(row.group)):
            return False
        return any(not each.live and each.priority >= row.priority for each in self.running)

    def _shared(self, group: Hashable) -> float:
        """How much of a full denoise call's time does not depend on its rows; 0 where not known."""
        step_s = self._costs.step_s(group) if self._costs is not None else 0.0
        if self._costs is None or not step_s:
            return 0.0
        return self._costs.step_fixed_s(group) / step_s

    def _ready(self) -> list[R]:
        """The running rows that are in no call."""
        return [row for row in self.running if row not in self._in_call]

    def _admit(self) -> None:
        while self._num_running_lanes < self.limits.max_running:
            if (row := self._next_to_run()) is None:
                return
            lanes = self._num_running_lanes + row.num_lanes
            if lanes > self.limits.max_running:
                return
            self.waiting.remove(row)
            self.running.append(row)
            self._num_running_lanes = lanes

    def _next_to_run(self) -> R | None:
        """The first to come of the tenant with the fewest rows running, of the highest priority;
        no clip where clips have their half of the lanes, no live frame where those have.
        """
        waiting = admissible(self.waiting, self.running, self.limits)
        running = Counter(row.tenant for row in self.running)
        return min(waiting, key=lambda row: (-row.priority, running[row.tenant]), default=None)

    def _encode(self, ready: Sequence[R]) -> Work[R] | None:
        for stage in (Stage.ENCODE_TEXT, Stage.ENCODE_IMAGE):
            rows = _urgent_first(row for row in ready if row.stage is stage)
            if rows:
                alike = None
                if stage is Stage.ENCODE_IMAGE:
                    alike = rows[0].encoding
                    rows = [row for row in rows if row.encoding == alike]
                    rows = rows[: self.limits.decode_rows(alike)]
                chosen = tuple(rows[: self.limits.max_decode_batch])
                return Work(KIND_OF_STAGE[stage], chosen, alike)
        return None

    def _decode_or_denoise(self, ready: Sequence[R]) -> Work[R] | None:
        decodable = [row for row in ready if row.stage in DECODED]
        decodable = _urgent_first(sorted(decodable, key=lambda row: self._places.get(row, 0)))
        denoisable = [row for row in ready if row.stage is Stage.DENOISE]
        batch = self._next_batch(denoisable)
        if decodable and not (batch and self._decoded_last):
            decoding = decodable[0].decoding
            chunk = [row for row in decodable if row.decoding == decoding]
            chunk = chunk[: self.limits.decode_rows(decoding)]
            if not self._pays_to_wait(chunk, batch):
                return Work(WorkKind.DECODE, tuple(chunk), decoding)
            self._num_decodes_put_off += 1
        for row in batch:
            self._served[row.tenant] += pictures_of(row)
        return Work(WorkKind.DENOISE, tuple(batch), batch[0].group) if batch else None

    def _next_batch(self, denoisable: Sequence[R]) -> list[R]:
        """The rows that step next: of one group, as many as there are lanes."""
        batch: list[R] = []
        num_pictures = 0
        for row in _same_group(self._in_turn(self._turns.of(denoisable))):
            num_pictures += pictures_of(row)
            if batch and num_pictures > self.limits.max_batch:
                break
            batch.append(row)
        return batch

    def _pays_to_wait(self, chunk: Sequence[R], batch: Sequence[R]) -> bool:
        """Whether to decode these rows together with those that the next step finishes.

        One decode call less saves its fixed part for each row that is behind it; the rows of the
        chunk pay with the time of a step. Every wait adds a row, so a full chunk ends it.
        """
        first = chunk[0]
        last_steps = [
            row for row in batch if row.num_steps_left == 1 and row.decoding == first.decoding
        ]
        num_rows = len(chunk) + len(last_steps)
        if (
            self._costs is None
            or not last_steps
            or num_rows > self.limits.decode_rows(first.decoding)
            or self._num_decodes_put_off >= self.limits.max_decode_batch
            or first.priority > min(row.priority for row in last_steps)
        ):
            return False
        num_behind = sum(row.priority >= first.priority for row in self._arrivals) - len(chunk)
        saved_s = self._costs.decode_fixed_s(first.decoding) * num_behind
        return saved_s > self._costs.step_s(batch[0].group) * len(chunk)

    def _in_turn(self, rows: Sequence[R]) -> list[R]:
        """These rows in the order in which they should step: by priority, turn of tenant, rank."""
        turns = dict(self._served)
        ranked = []
        for row in sorted(rows, key=self._rank):  # stable: ties stay in order of arrival
            ranked.append((-row.priority, turns[row.tenant], row))
            turns[row.tenant] += pictures_of(row)
        ranked.sort(key=lambda entry: entry[:2])  # stable: ties stay in order of rank
        return [row for _, _, row in ranked]

    def _rank(self, row: R) -> float:
        patience = self.limits.patience
        num_left = row.num_steps_left * row.num_frames
        return num_left * patience + self._arrivals[row] if patience else 0.0


def _urgent_first(rows: Iterable[R]) -> list[R]:
    """By priority, and among equals in the order in which they stand."""
    return sorted(rows, key=lambda row: -row.priority)


def _same_group(rows: Sequence[R]) -> list[R]:
    """The rows that can share a call with the first one."""
    return [row for row in rows if row.group == rows[0].group]
