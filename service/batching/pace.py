"""How long engine calls take, as measured lately: what the scheduler and deadlines count on.

Pure bookkeeping, kept by the engine loop under its lock: no threads, no clock.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from engines.drawing.drawing import Group
from service.batching.request import Row
from service.batching.scheduler import WorkKind

FORGET = 1.05  # a call as fast as the fastest must come again within some dozens of calls


class Pace:
    """The fastest recent calls by kind, size and number of rows; times in seconds, 0 if unknown."""

    def __init__(self) -> None:
        self._fastest_s: defaultdict[tuple[WorkKind, tuple[int, ...]], dict[int, float]]
        self._fastest_s = defaultdict(dict)  # kind and shape of the latents → rows → seconds

    def note(self, kind: WorkKind, group: Group, num_rows: int, seconds: float) -> None:
        """A call came back."""
        fastest_s = self._of(kind, group)
        fastest_s[num_rows] = min(seconds, FORGET * fastest_s.get(num_rows, seconds))

    def step_s(self, group: Group) -> float:
        """A denoise call of as many rows as there ever were."""
        return self._fastest(WorkKind.DENOISE, group, sys.maxsize)

    def step_fixed_s(self, group: Group) -> float:
        """The part of a denoise call that does not depend on its rows."""
        return self._fixed_s(WorkKind.DENOISE, group)

    def decode_fixed_s(self, group: Group) -> float:
        """The part of a decode call that does not depend on its rows: what one call less saves."""
        return self._fixed_s(WorkKind.DECODE, group)

    def _fixed_s(self, kind: WorkKind, group: Group) -> float:
        fastest_s = self._of(kind, group)
        if len(fastest_s) < 2:
            return 0.0
        few, many = min(fastest_s), max(fastest_s)
        per_row_s = (fastest_s[many] - fastest_s[few]) / (many - few)
        return min(max(0.0, fastest_s[few] - few * per_row_s), fastest_s[few])

    def least_s(self, row: Row, num_rows: int) -> float:
        """What is left of a row takes this long even if every call is as fast as the fastest.

        ``num_rows`` are there, so a call has as many of them as it can. Only a row that has all its
        steps behind it may hope to be decoded alone: much is lost with it, and little before.
        """
        num_steps, group = row.num_steps_left, row.drawing.group
        step_s = self._fastest(WorkKind.DENOISE, group, num_rows)
        return num_steps * step_s + self._fastest(
            WorkKind.DECODE, group, num_rows if num_steps else 1
        )

    def _fastest(self, kind: WorkKind, group: Group, num_rows: int) -> float:
        """Of the calls seen, the largest of at most ``num_rows``; 0 where there is none."""
        fastest_s = self._of(kind, group)
        largest = max(fastest_s, default=0)
        if largest > num_rows:
            largest = max((n for n in fastest_s if n <= num_rows), default=0)
        return fastest_s.get(largest, 0.0)

    def _of(self, kind: WorkKind, group: Group) -> dict[int, float]:
        return self._fastest_s[kind, group.latents]
