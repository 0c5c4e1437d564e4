"""Pictures that somebody waits for, clips and live frames on one engine: whose turn it is.

A clip is a job, and one step of it takes as long as many of a picture's; of live frames there are
always more. So pictures go first, and while there are any

- a clip steps once in `CLIP_PATIENCE` denoise calls: a picture of a few steps meets one such call,
  or none, and clips are never stopped;
- live frames, of however many sessions, take part in one call of some: of `LIVE_PATIENCE` where a
  step costs by the row (a CPU), for the gaps are as good; of fewer the more of its time is the
  call's own, which all of them share, down to `SHARED_PATIENCE` where half of it is.

In simulated time (`python -m loadtests clips`: the GPU-shaped double, clips of 16 frames, 1, 2 or 8
always open, pictures of 4 steps at 30 to 70 % load) the p95 of pictures is 1.3 to 1.5 times what it
is without clips. With clips in rank and turn like pictures it had been 3 to 23 times.

Beside live sessions (`python -m loadtests live --simulated`: 1, 4 or 16, half loaded) it is 1.1 to
1.2 times on the CPU-shaped double and 1.1 to 1.9 on the GPU-shaped one. With frames that waited for
eight calls at most, or joined every batch of a GPU's, it had been 1.2 to 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from service.batching.scheduler import Limits, Schedulable

R = TypeVar("R", bound="Schedulable")

# Denoise calls. Simulated as above: 8 gives 1.5 to 1.7 and a third more clips, 32 gives 1.2 to 1.45
# and 0.6 of them.
CLIP_PATIENCE = 16
# Calls of any kind. Simulated as above with one session: 16 on a CPU gives 1.11 and no more frames,
# for the gaps have them; on a GPU 2 gives 1.08 and 8 frames a second, 3 gives 1.06 and 6.5. With
# frames that are encoded first and superseded by newer ones (150 s, 12 ms an encoding): on a CPU 10
# gives 1.10, 1.32 and 1.32 beside 1, 4 and 16 sessions, 24 gives 1.08, 1.11 and 1.12, of as many
# frames.
LIVE_PATIENCE, SHARED_PATIENCE = 24, 3


def pictures_of(row: Schedulable) -> int:
    """What a step of a row takes of a denoise call: its lanes, of a clip each of its frames."""
    return row.num_lanes * row.num_frames


def is_clip(row: Schedulable) -> bool:
    return row.num_frames > 1


def is_live(row: Schedulable) -> bool:
    return row.live


class Turns:
    """Kept by the scheduler; counts its calls."""

    def __init__(self) -> None:
        self._num_denoise_calls_since_clip = CLIP_PATIENCE
        self._num_calls_since_live = 0

    def note(self, rows: Sequence[Schedulable], *, denoise: bool) -> None:
        """A call of these begins."""
        live = any(row.live for row in rows)
        self._num_calls_since_live = 0 if live else self._num_calls_since_live + 1
        if denoise:
            clips = any(map(is_clip, rows))
            since = self._num_denoise_calls_since_clip
            self._num_denoise_calls_since_clip = 0 if clips else since + 1

    def is_live(self, shared: float) -> bool:
        """Whether live frames may be in the next call, though pictures are here; ``shared``: how
        much of a full call's time does not depend on its rows, from 0 to 1.
        """
        less = min(1.0, 2 * shared) * (LIVE_PATIENCE - SHARED_PATIENCE)
        return self._num_calls_since_live >= LIVE_PATIENCE - round(less)

    def of(self, rows: Sequence[R]) -> Sequence[R]:
        """Those of the rows that may step next: pictures or clips, whichever is more urgent, and
        all where there is but one kind.
        """
        pictures = [row for row in rows if not is_clip(row)]
        clips = [row for row in rows if is_clip(row)]
        if not pictures or not clips:
            return rows
        lead = max(row.priority for row in pictures) - max(row.priority for row in clips)
        if lead:
            return pictures if lead > 0 else clips
        return clips if self._num_denoise_calls_since_clip >= CLIP_PATIENCE else pictures


def admissible(waiting: Sequence[R], running: Sequence[R], limits: Limits) -> Sequence[R]:
    """Without clips where they have half of the lanes in flight, and without live frames where they
    have, and could fill a batch: what goes before them finds room.
    """
    half = limits.max_running // 2
    for gives_way, most in ((is_clip, half), (is_live, max(half, limits.max_batch))):
        if sum(row.num_lanes for row in running if gives_way(row)) >= most:
            waiting = [row for row in waiting if not gives_way(row)]
    return waiting
