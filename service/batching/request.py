"""One accepted job and its rows: the only lasting truth about work in flight.

Everything else (a batch, a schedule) is a view of these made for one step. Rows change on the
engine threads alone, each in one call at a time; handlers see them through the events a request
sends back. The scheduler reads this module, so it imports no torch.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from engines.drawing.drawing import Drawing
    from engines.drawing.stage import Stage
    from service.errors import ServiceError


class Status(enum.IntEnum):
    """Life of a request; everything from ``COMPLETED`` on is finished."""

    WAITING = 0
    RUNNING = 1
    COMPLETED = 2
    FAILED = 3
    CANCELLED = 4
    EXPIRED = 5

    @property
    def finished(self) -> bool:
        return self >= Status.COMPLETED


class Kind(NamedTuple):
    """What decides who goes before whom (`service.batching.turns`), of a request."""

    tenant: str
    priority: int
    is_clip: bool = False
    is_live: bool = False

    def is_behind(self, other: Kind) -> bool:
        """Whether it gives way to the other: clips do to pictures, live frames to both."""
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[int, bool, bool]:
        return self.priority, not self.is_live, not self.is_clip


@dataclass(slots=True)
class Timings:
    """Seconds a request spent, by what it waited for. Filled by the engine loop and the handler.

    ``parse_s`` runs from the first byte to admission, before all that ``total_s`` covers;
    ``queue_s`` from there to the first engine call; each ``*_s`` of an engine stage is the sum of
    the calls in which at least one row of the request took part. Rows of a request of several may
    be in calls side by side, whose seconds all count.
    """

    parse_s: float = 0.0
    queue_s: float = 0.0
    encode_text_s: float = 0.0
    encode_image_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    image_encode_s: float = 0.0
    total_s: float = 0.0

    def milliseconds(self) -> dict[str, float]:
        """``{"queue_ms": …, "total_ms": …}`` rounded to a microsecond."""
        return {
            f"{name[:-2]}_ms": round(getattr(self, name) * 1e3, 3)
            for name in self.__dataclass_fields__
        }


@dataclass(frozen=True, slots=True)
class Preview:
    """A row's current guess at its final image: uint8 ``[H, W, 3]``."""

    row_index: int
    preview_index: int
    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class Finished:
    """A row's final image: uint8 ``[H, W, 3]``."""

    row_index: int
    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class Resolved:
    """The last event of every request; ``error`` is None when all rows finished."""

    error: ServiceError | None


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A stage as one request met it, for its trace; ``started_at`` is on the engine loop's clock.

    ``batch_id`` numbers the engine call, None where there was none; its rows are of all requests.
    """

    stage: str
    started_at: float
    seconds: float
    batch_id: int | None = None
    num_rows: int = 0
    num_lanes: int = 0


Event = Preview | Finished | Resolved


@dataclass(slots=True, eq=False)
class Row:
    """One image or clip in flight. From ``stage`` to ``num_steps_left`` all is the drawing's."""

    request: Request
    index: int
    drawing: Drawing

    @property
    def stage(self) -> Stage:
        return self.drawing.stage

    @property
    def group(self) -> Hashable:
        return self.drawing.group

    @property
    def encoding(self) -> Hashable:
        return self.drawing.encoding

    @property
    def decoding(self) -> Hashable:
        return self.drawing.decoding

    @property
    def num_lanes(self) -> int:
        return self.drawing.num_lanes

    @property
    def num_frames(self) -> int:
        """1 but of clips."""
        return self.drawing.recipe.num_frames

    @property
    def num_steps_left(self) -> int:
        return self.drawing.num_steps - self.drawing.step_index

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def deadline(self) -> float:
        return self.request.deadline

    @property
    def cancelled(self) -> bool:
        """Whether it leaves at the next step boundary. One that is superseded stays when half of it
        is done: a picture is made with less than the newer one would take.

        One whose picture is encoded, and no more, leaves. In simulation (2 steps, half loaded) to
        keep it gave one session 5 % more frames on a CPU and 2 % on a GPU's double, 4 and 16 none
        and 3 to 4 %; but the API beside 16 on a CPU a p95 of 1.16 to 1.20 for 1.11 to 1.13.
        """
        mostly_to_do = 2 * self.num_steps_left > self.drawing.num_steps
        return self.request.cancelled or (self.request.superseded and mostly_to_do)

    @property
    def live(self) -> bool:
        return self.request.live


@dataclass(slots=True, eq=False)
class Request:
    """One accepted HTTP job of one or more images, with its own reply channel.

    ``arrived_at`` and ``deadline`` are seconds on the engine loop's clock. ``send`` may be called
    from any thread; it is how every event reaches the handler. ``tenant`` is whose it is: the name
    of an API key, or nobody's.
    """

    request_id: str
    arrived_at: float
    deadline: float
    send: Callable[[Event], None]
    rows: list[Row] = field(default_factory=list)  # filled at admission
    tenant: str = ""
    priority: int = 0  # higher goes first
    live: bool = False  # a frame of a live session, which gives way to others
    status: Status = Status.WAITING  # written by the engine loop alone
    cancelled: bool = False  # set by the handler, honoured at the next step boundary
    superseded: bool = False  # likewise, while most of it is still to do
    num_finished: int = 0
    timings: Timings = field(default_factory=Timings)
    records: list[StageRecord] | None = None  # a list where the request is traced

    @property
    def num_images(self) -> int:
        """What it counts for where room is counted: a clip as many as it has frames."""
        return sum(row.num_frames for row in self.rows)

    @property
    def kind(self) -> Kind:
        is_clip = any(row.num_frames > 1 for row in self.rows)
        return Kind(self.tenant, self.priority, is_clip, self.live)
