"""A client in open or closed loop, and what it saw.

Open loop: requests leave at their times whatever the answers do, and latency counts from the time
a request was due, so a stalled server cannot hide its queue (no coordinated omission). Nothing is
sent to a host that was not named, and nothing without end.
"""

from __future__ import annotations

import asyncio
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import aiohttp
import typer

from loadtests.traffic import Ask
from service.ray_serve.machine import is_loopback

PATH = "/v1/images/generations"
REQUEST_TIMEOUT_S = 120.0
MAX_REQUESTS = 100_000  # of one run, whatever the rate and the time multiply to
SERVER_TIMING = re.compile(r"(\w+);dur=([\d.]+)")


@dataclass(frozen=True, slots=True)
class Answer:
    """One exchange; times in seconds from the start of the run. ``status`` 0: no answer came."""

    ask: Ask
    due_s: float
    sent_s: float
    first_byte_s: float
    done_s: float
    status: int
    num_bytes: int = 0
    timings: dict[str, float] = field(default_factory=dict)  # ms, from the Server-Timing header

    @property
    def latency_s(self) -> float:
        return self.done_s - self.due_s

    @property
    def ok(self) -> bool:
        return self.status == 200


def check_url(url: str, allowed_hosts: Sequence[str] = ()) -> str:
    """The URL without a trailing slash.

    Raises:
        typer.BadParameter: neither this machine nor a host that was named with --allow-host.
    """
    host = urllib.parse.urlsplit(url).hostname
    if host is None or not (is_loopback(host) or host in allowed_hosts):
        raise typer.BadParameter(
            f"--url is {url}; load goes to this machine only, or to a host that you name "
            f"with --allow-host {host or 'HOST'}"
        )
    return url.rstrip("/")


UrlOption = Annotated[
    str, typer.Option(help="Base URL of a running service; empty: one is started here.")
]
AllowHostOption = Annotated[
    list[str] | None, typer.Option(help="A host other than this machine that may be loaded.")
]


class Latencies:
    """An HDR histogram of seconds: 10 µs to 10 minutes, three significant digits."""

    def __init__(self, seconds: Iterable[float]) -> None:
        from hdrh.histogram import HdrHistogram  # here: `loadtests gpu` does without

        self._histogram = HdrHistogram(1, 60_000_000, 3)  # units of 10 µs
        for value in seconds:
            self._histogram.record_value(max(1, round(value * 1e5)))

    def __len__(self) -> int:
        return int(self._histogram.get_total_count())

    def ms(self, percent: float) -> float:
        """The percentile, in milliseconds; NaN of nothing."""
        if not len(self):
            return float("nan")
        return float(self._histogram.get_value_at_percentile(percent)) / 100

    def summary(self) -> dict[str, float]:
        return {f"p{p}_ms": round(self.ms(p), 2) for p in (50, 95, 99)}


def summarise(answers: Sequence[Answer]) -> dict[str, float]:
    """What a table needs of a run: percentiles of latency and first byte, rate, errors."""
    good = [answer for answer in answers if answer.ok]
    span = max((answer.done_s for answer in good), default=0.0)
    first = Latencies(answer.first_byte_s - answer.due_s for answer in good)
    return {
        **Latencies(answer.latency_s for answer in good).summary(),
        "first_byte_p50_ms": round(first.ms(50), 2),
        "images_per_s": round(len(good) / span, 3) if span else 0.0,
        "error_share": round(1 - len(good) / max(1, len(answers)), 5),
        "num_requests": len(answers),
    }


class Client:
    """Posts to one URL. ``body`` turns an ask into what that server reads."""

    def __init__(
        self,
        url: str,
        path: str = PATH,
        body: Callable[[Ask], Any] = Ask.body,
        accept: str = "image/png",
    ) -> None:
        self._url, self._body, self._accept = url + path, body, accept

    def open_loop(
        self, asks: Sequence[Ask], due_s: Sequence[float], done: Callable[[], Any] = lambda: None
    ) -> list[Answer]:
        """Send every ask when it is due; ``done`` is called at each answer."""
        return asyncio.run(self._run(asks, due_s, len(asks), done))

    def closed_loop(
        self, asks: Sequence[Ask], num_clients: int, seconds: float = float("inf")
    ) -> list[Answer]:
        """``num_clients`` that each send the next ask when the last is answered, up to a time."""
        return asyncio.run(self._closed(asks, num_clients, seconds))

    async def _run(
        self, asks: Sequence[Ask], due_s: Sequence[float], count: int, done: Callable[[], Any]
    ) -> list[Answer]:
        _check_count(count)
        async with self._session() as session:
            begun = time.perf_counter()

            async def one(ask: Ask, due: float) -> Answer:
                await asyncio.sleep(due - (time.perf_counter() - begun))
                answer = await self._post(session, ask, begun, due)
                done()
                return answer

            tasks: list[Awaitable[Answer]] = [
                one(ask, due) for ask, due in zip(asks, due_s, strict=True)
            ]
            return list(await asyncio.gather(*tasks))

    async def _closed(self, asks: Sequence[Ask], num_clients: int, seconds: float) -> list[Answer]:
        _check_count(len(asks))
        left = iter(asks)
        answers: list[Answer] = []
        async with self._session() as session:
            begun = time.perf_counter()

            async def client() -> None:
                while (now := time.perf_counter() - begun) < seconds:
                    ask = next(left, None)
                    if ask is None:
                        return
                    answers.append(await self._post(session, ask, begun, now))

            await asyncio.gather(*(client() for _ in range(num_clients)))
        return answers

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
            headers={"accept": self._accept},
        )

    async def _post(
        self, session: aiohttp.ClientSession, ask: Ask, begun: float, due_s: float
    ) -> Answer:
        sent_s = first_s = time.perf_counter() - begun
        try:
            async with session.post(self._url, json=self._body(ask)) as response:
                first_s = time.perf_counter() - begun
                data = await response.read()
                found = SERVER_TIMING.findall(response.headers.get("server-timing", ""))
                status, num_bytes = response.status, len(data)
                timings = {name: float(value) for name, value in found}
        except (aiohttp.ClientError, TimeoutError):
            status, num_bytes, timings = 0, 0, {}
        done_s = time.perf_counter() - begun
        return Answer(ask, due_s, sent_s, first_s, done_s, status, num_bytes, timings)


def _check_count(count: int) -> None:
    if count > MAX_REQUESTS:
        raise typer.BadParameter(
            f"{count} requests are asked for; one run sends at most {MAX_REQUESTS}, lower the "
            "rate or the time"
        )


def require_answers(answers: Sequence[Answer], who: str) -> None:
    """Raise RuntimeError where any request failed: a benchmark with failures is none."""
    failed = [answer for answer in answers if not answer.ok]
    if failed:
        statuses = sorted({answer.status for answer in failed})
        raise RuntimeError(
            f"{who}: {len(failed)} of {len(answers)} requests failed, with status {statuses}"
        )
