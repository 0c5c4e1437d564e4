"""Clients that draw through every node's proxy in turn, as a Service sends them; what they got."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import httpx

from service.access.keys import make_key

SECRET, LINE = make_key("test")  # of every client; and the line of the file of keys
AGAIN = "502, to be tried again"
CLOSED = repr(httpx.RemoteProtocolError("Server disconnected without sending a response."))
PAUSE_S = 0.05  # of a client between two images


class Load:
    """Inside `with` its clients ask, one request after the other each.

    ``ready`` names the nodes that a Service would have now, ``ask`` sends one of them the request
    of a number. Outcomes are status codes, `AGAIN`, or what the connection ended with.
    """

    def __init__(
        self,
        ready: Callable[[], list[str]],
        ask: Callable[[str, int], httpx.Response],
        num_clients: int,
    ) -> None:
        self.by_node: defaultdict[str, Counter[int | str]] = defaultdict(Counter)
        self.ready = ready
        self._ask = ask
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._draw, args=(number,)) for number in range(num_clients)
        ]

    @property
    def outcomes(self) -> Counter[int | str]:
        return sum(list(self.by_node.values()), Counter())

    def _draw(self, number: int) -> None:
        while not self._stop.is_set():
            nodes = sorted(self.ready())
            node = nodes[number % len(nodes)]
            try:
                answer = self._ask(node, number)
                again = answer.status_code == 502 and "Retry-After" in answer.headers
                self.by_node[node][AGAIN if again else answer.status_code] += 1
            except httpx.HTTPError as error:
                self.by_node[node][repr(error)] += 1
            number += 1
            time.sleep(PAUSE_S)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
