"""From the engine threads to an event loop: one wake-up for all that is sent in one go."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable


class Mailbox:
    """Runs what is put into it on its event loop, in order.

    A wake-up is a system call, during which the other threads of the process get their turn at the
    interpreter; whoever makes one for each of several things waits for theirs every time.
    """

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        self.event_loop = event_loop
        self._mail: deque[Callable[[], object]] = deque()
        self._awaited = False  # the event loop has been told and has not looked yet

    def put(self, call: Callable[[], object]) -> None:
        """From any thread. Once the event loop is closed nobody listens, and nothing happens."""
        self._mail.append(call)
        if not self._awaited:
            self._awaited = True
            with contextlib.suppress(RuntimeError):
                self.event_loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._awaited = False  # first: what is put from now on makes a call of its own
        while self._mail:
            self.event_loop.call_soon(self._mail.popleft())
