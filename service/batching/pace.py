"""How long engine calls take, as measured lately: what the scheduler and deadlines count on.

Pure bookkeeping, kept by the engine loop under its lock: no threads, no clock.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable
from typing import Any

from engines.drawing.decoding import Decoding
from engines.drawing.drawing import Group
from service.batching.request import Row
from service.batching.scheduler import Work, WorkKind

FORGET = 1.05  # a call as fast as the fastest must come again within some dozens of calls
# The first calls of a size find memory, and on a GPU kernels and a graph. Were rows refused by what
# these take, no further call of that size would ever be seen.
TELLING = 8


class Pace:
    """The fastest recent denoise calls and decodes by size, decoder and number of rows; times in
    seconds, 0 if unknown.
    """

    def __init__(self) -> None:
        # Shape of the latents, or how they are decoded → rows → seconds.
        self._fastest_s: defaultdict[Hashable, dict[int, float]] = defaultdict(dict)
        self._num_calls: Counter[tuple[Hashable, int]] = Counter()  # of so many rows, so far

    def note(self, work: Work[Any], seconds: float) -> None:
        """A call came back."""
        if work.kind not in (WorkKind.DENOISE, WorkKind.DECODE):
            return
        key, num_rows = _key(work.alike), len(work.rows)
        self._num_calls[key, num_rows] += 1
        fastest_s = self._fastest_s[key]
        fastest_s[num_rows] = min(seconds, FORGET * fastest_s.get(num_rows, seconds))

    def step_s(self, group: Group) -> float:
        """A denoise call of as many rows as there ever were."""
        fastest_s = self._fastest_s[_key(group)]
        return fastest_s.get(max(fastest_s, default=0), 0.0)

    def step_fixed_s(self, group: Group) -> float:
        """The part of a denoise call that does not depend on its rows."""
        return self._fixed_s(group)

    def decode_fixed_s(self, decoding: Decoding) -> float:
        """The part of a decode call that does not depend on its rows: what one call less saves."""
        return self._fixed_s(decoding)

    def _fixed_s(self, alike: Group | Decoding) -> float:
        fastest_s = self._fastest_s[_key(alike)]
        if len(fastest_s) < 2:
            return 0.0
        few, many = min(fastest_s), max(fastest_s)
        per_row_s = (fastest_s[many] - fastest_s[few]) / (many - few)
        return min(max(0.0, fastest_s[few] - few * per_row_s), fastest_s[few])

    def least_s(self, row: Row, num_rows: int) -> float:
        """What is left of a row takes this long even if every call is as fast as the fastest.

        ``num_rows`` are there, so a call has as many of them as it can; 0 until some calls of so
        many, or fewer, have told it. Only a row that has all its steps behind it may hope to be
        decoded alone: much is lost with it, and little before.
        """
        num_steps, drawing = row.num_steps_left, row.drawing
        step_s = self._told(drawing.group, num_rows)
        return num_steps * step_s + self._told(drawing.decoding, num_rows if num_steps else 1)

    def _told(self, alike: Group | Decoding, num_rows: int) -> float:
        """Of the calls seen `TELLING` times, the largest of at most ``num_rows``; 0 where there is
        none.
        """
        key = _key(alike)
        fastest_s = self._fastest_s[key]
        told = (n for n in fastest_s if n <= num_rows and self._num_calls[key, n] >= TELLING)
        return fastest_s.get(max(told, default=0), 0.0)


def _key(alike: Group | Decoding) -> Hashable:
    """LoRAs and conditioning cost nothing that is worth telling apart."""
    return alike if isinstance(alike, Decoding) else alike.latents
