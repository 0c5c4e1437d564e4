"""How much work is open, whose it is, and what a row costs: may one more request come in?

Pure bookkeeping, kept by the engine loop under its lock: no threads, no clock (time is passed in).
"""

from __future__ import annotations

from collections import Counter

from service.batching.request import Kind, Request
from service.errors import Overloaded

PUNCTUAL = 0.9  # of the time left; the answer still has to be encoded and sent
COST_WEIGHT = 0.1  # of the newest row in the average cost: the last twenty count for most of it


class Backlog:
    """The images accepted and not finished, by their kind; a clip is as many of them as it has
    frames.

    ``max_rows`` bounds them. A tenant with a name may hold no more of them than it leaves to
    others, so that a newcomer always finds room.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._num_rows: Counter[Kind] = Counter()
        self._s_per_row = 0.0  # engine seconds that a row costs, measured
        self._unattributed_s = 0.0  # engine seconds since the last row was finished

    def add(self, request: Request) -> None:
        self._num_rows[request.kind] += request.num_images

    def remove(self, request: Request) -> None:
        self._num_rows[request.kind] -= request.num_images
        self._num_rows += Counter()  # forgets those that have none left

    def check(self, num_new: int, kind: Kind, left_s: float) -> None:
        """Raises `Overloaded` when there are too many rows, or too many for so many more to be
        finished in ``left_s``.
        """
        total = self._num_rows.total()
        held = self._held_by(kind.tenant) if kind.tenant else 0
        num_ahead = self._num_ahead_of(num_new, kind)
        if total + held + num_new > self._max_rows:
            whose = f", {held} of them of this API key" if held else ""
            raise Overloaded(
                f"{total} images are waiting or running{whose}, of at most {self._max_rows}; "
                f"this request would add {num_new}",
                retry_after_s=num_ahead * self._s_per_row,
            )
        wait_s, bearable_s = (num_ahead + num_new) * self._s_per_row, PUNCTUAL * left_s
        if num_ahead and wait_s > bearable_s:
            raise Overloaded(
                f"{num_ahead} images go before this request, which would take about {wait_s:.1f} s "
                f"in all; it has {left_s:.1f} s (X-Request-Timeout), a tenth of it for the answer",
                retry_after_s=wait_s - bearable_s,
            )

    def _held_by(self, tenant: str) -> int:
        return sum(count for kind, count in self._num_rows.items() if kind.tenant == tenant)

    def _num_ahead_of(self, num_new: int, new: Kind) -> int:
        """Rows as urgent or more so: all of its own tenant's, and of each other's as many again.

        Tenants take turns, so another's further rows come after this request's.
        """
        ahead: Counter[str] = Counter()
        for kind, num_rows in self._num_rows.items():
            ahead[kind.tenant] += 0 if kind.is_behind(new) else num_rows
        own = ahead.pop(new.tenant, 0)
        return own + sum(min(count, own + num_new) for count in ahead.values())

    # -- what the engine threads measure -----------------------------------------------------

    def note_call(self, seconds: float) -> None:
        """An engine call came back."""
        self._unattributed_s += seconds

    def note_finished(self, num_rows: int) -> None:
        """Rows were finished: what the engine did since the last ones is their cost, idling not."""
        for _ in range(num_rows):
            share_s = self._unattributed_s / num_rows
            weight = COST_WEIGHT if self._s_per_row else 1.0
            self._s_per_row += weight * (share_s - self._s_per_row)
        if num_rows:
            self._unattributed_s = 0.0
