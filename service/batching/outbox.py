"""Events on their way to those who wait for them, in the order in which they came about."""

from __future__ import annotations

import threading
from collections import deque

from service.batching.request import Event, Request


class Outbox:
    """Posted to under the engine loop's lock, sent out of without it."""

    def __init__(self) -> None:
        self._events: deque[tuple[Request, Event]] = deque()
        self._sending = threading.Lock()  # one sends at a time, so that all stays in order

    def post(self, request: Request, event: Event) -> None:
        self._events.append((request, event))

    def send_out(self) -> None:
        """Hand over the events since the last time: at the latest when the engine is next asked.

        Not sooner, for whoever receives them sets to work, and this thread has an engine waiting.
        """
        with self._sending:
            while self._events:
                request, event = self._events.popleft()
                request.send(event)
