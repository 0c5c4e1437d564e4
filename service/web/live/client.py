"""A client of ``fourstep.v1``: sends frames at a pace, whether or not pictures keep up with it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
from websockets.asyncio.client import ClientConnection, connect

from service.web.live.messages import PROTOCOL

MAX_MESSAGE_BYTES = 2**26  # of a picture


@dataclass
class Tally:
    """What became of the frames that were sent."""

    num_sent: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)  # from a frame to its picture
    seconds: float = 0.0  # from the first frame to the last answer

    @property
    def fps(self) -> float:
        """Pictures a second."""
        return len(self.latencies_s) / self.seconds if self.seconds else 0.0


class LiveError(RuntimeError):
    """The service said no; the message is its own."""


def address_of(url: str) -> str:
    """The WebSocket of a service that answers at ``http://…`` or ``https://…``."""
    return f"ws{url.removeprefix('http').rstrip('/')}/v1/realtime/images"


async def play(
    url: str,
    frames: Sequence[bytes | None],
    *,
    values: Mapping[str, Any],
    fps: float,
    seconds: float,
    key: str = "",
    on_picture: Callable[[Mapping[str, Any]], None] = lambda picture: None,
) -> Tally:
    """Send ``frames`` (files, None for a picture from the prompt alone) in turn at ``fps`` a
    second, for ``seconds``; each picture's message goes to ``on_picture``.

    Raises:
        LiveError: a message of the service's, or why it closed.
        OSError, websockets.exceptions.WebSocketException: there is no such service.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with connect(
        address_of(url), subprotocols=[PROTOCOL], additional_headers=headers,  # type: ignore[list-item]
        max_size=MAX_MESSAGE_BYTES,
    ) as socket:  # fmt: skip
        await socket.send(msgpack.packb({"type": "session.update", **values}))
        _heard(await socket.recv())
        sent_at: dict[int, float] = {}
        tally = Tally()
        begun = time.perf_counter()
        sending = asyncio.ensure_future(_send(socket, frames, fps, begun + seconds, sent_at, tally))
        try:
            num_answered = 0
            while not sending.done() or num_answered < tally.num_sent:
                message = _heard(await socket.recv())
                num_answered += 1
                if message["type"] == "skipped":
                    tally.skipped[message["reason"]] += 1
                else:
                    tally.latencies_s.append(time.perf_counter() - sent_at[message["id"]])
                    on_picture(message)
        finally:
            sending.cancel()
        tally.seconds = time.perf_counter() - begun
        return tally


async def _send(
    socket: ClientConnection,
    frames: Sequence[bytes | None],
    fps: float,
    until: float,
    sent_at: dict[int, float],
    tally: Tally,
) -> None:
    begun = time.perf_counter()
    for number, image in zip(itertools.count(), itertools.cycle(frames)):
        due = begun + number / fps
        if due >= until:
            return
        await asyncio.sleep(due - time.perf_counter())
        sent_at[number] = time.perf_counter()
        await socket.send(msgpack.packb({"type": "frame", "id": number, "image": image}))
        tally.num_sent += 1


def _heard(data: bytes | str) -> dict[str, Any]:
    message: dict[str, Any] = msgpack.unpackb(data)
    if message["type"] == "error":
        raise LiveError(message["error"]["message"])
    return message
