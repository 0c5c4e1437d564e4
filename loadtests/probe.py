"""One kept-alive connection of the standard library: the client that costs least CPU.

It shares the cores with what it measures, and is used where single milliseconds count.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from collections.abc import Callable

from loadtests.client import PATH, REQUEST_TIMEOUT_S
from loadtests.traffic import Ask

PAUSE_S = 0.02  # between two looks at the way; more would be load
HEADERS = {"content-type": "application/json", "accept": "image/png"}


class Connection:
    """Asks one thing at a time."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        assert parts.hostname is not None, "checked on entry"
        self._connection = kind(parts.hostname, parts.port, timeout=REQUEST_TIMEOUT_S)
        self._prefix = parts.path

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def draw(self, ask: Ask) -> bytes:
        """The image.

        Raises:
            RuntimeError: any answer but 200.
        """
        status, data = self._exchange("POST", PATH, json.dumps(ask.body()))
        if status != 200:
            raise RuntimeError(f"the service answered {status}: {data[:500]!r}")
        return data

    def round_trips_ms(self, enough: Callable[[], bool]) -> list[float]:
        """The way there and back, until ``enough``: `/healthz` is answered at once."""
        found = []
        while not enough():
            begun = time.perf_counter()
            self._exchange("GET", "/healthz")
            found.append(1e3 * (time.perf_counter() - begun))
            time.sleep(PAUSE_S)
        return found

    def _exchange(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        self._connection.request(method, self._prefix + path, body, HEADERS)
        answer = self._connection.getresponse()
        return answer.status, answer.read()
