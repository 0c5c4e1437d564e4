"""Lets engine calls run side by side as long as all need the same set-up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turnstile:
    """Whoever needs another set-up waits until all are out, and changes it alone.

    In order of arrival, so that no change is put off by others who go in and out.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()
        self._num_inside = 0

    @contextmanager
    def enter(self, is_set: Callable[[], bool], set_up: Callable[[], None]) -> Iterator[None]:
        """Inside, ``is_set`` stays true. What ``set_up`` raises, the caller gets, and is not in."""
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: self._line[0] is ticket and (is_set() or not self._num_inside)
                )
                if not is_set():
                    set_up()
                self._num_inside += 1
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()
