"""One act of each kind of abuse against a service, on connections of their own, and its outcome.

All come from one address, which is not that of ordinary clients, and none is without end: an act
leaves after `PATIENCE_S`, whatever the service does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import msgpack
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from loadtests.abuse.files import uploads
from loadtests.client import PATH
from service.web.live.client import address_of
from service.web.live.messages import PROTOCOL

ABUSER = "127.0.0.2"  # the service counts connections by address
PATIENCE_S = 60.0
EDITS = "/v1/images/edits"
HEAD = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
JSON = b"application/json"
BOUNDARY = b"abuse"
DRAW = {"prompt": "a large red star", "num_inference_steps": 1, "size": "96x96"}
HOSTILE = {  # heads, by what is wrong with them
    "id of no ASCII": b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-request-id: \xff\r\n\r\n",
    "Ray's own headers": b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-session-id: \xff\r\n"
    b"serve_multiplexed_model_id: \xff\r\nx-request-timeout-seconds: 0\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * 40_000 + b"\r\n\r\n",
    "200 headers": b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x-a: a\r\n" * 200 + b"\r\n",
    "a long URL": b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\ncontent-length: 9\r\n\r\n",
    "length and chunks": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n"
    b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
    "TLS": b"\x16\x03\x01\x00\xa5\x01\x00" + bytes(160),
    "a deadline of nothing": HEAD % (PATH.encode(), JSON, 2)
    + b"x-request-timeout: 5e-324\r\n\r\n{}",
    "an image of no bytes": HEAD % (EDITS.encode(), b"multipart/form-data; boundary=x", 0),
    "JSON without end": HEAD % (PATH.encode(), JSON, 60_000) + b"[" * 60_000,
}
PHASES = ("fresh", "told", "drawing", "superseded", "unread")


@dataclass
class Target:
    """A service on this machine, and what is sent to it."""

    url: str
    host: str
    port: int
    rng: random.Random
    bodies: dict[str, bytes] = field(default_factory=dict)  # of edits

    @classmethod
    def of(cls, url: str, seed: int) -> Target:
        host, _, port = url.removeprefix("http://").rpartition(":")
        bodies = {name: form(data) for name, data in uploads().items()}
        return cls(url, host, int(port), random.Random(seed), bodies)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(
            self.host, self.port, local_addr=(ABUSER, 0), limit=2**16
        )
        try:
            yield reader, writer
        finally:
            drop(writer)


def drop(writer: asyncio.StreamWriter) -> None:
    """Without a goodbye: the other side is sent a reset."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def form(image: bytes) -> bytes:
    """The body of an edit."""
    fields = {**DRAW, "strength": 1}
    parts = [
        b'--%s\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        % (BOUNDARY, name.encode(), str(value).encode())
        for name, value in fields.items()
    ]
    parts.append(
        b'--%s\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n'
        b"content-type: image/png\r\n\r\n%s\r\n--%s--\r\n" % (BOUNDARY, image, BOUNDARY)
    )
    return b"".join(parts)


async def status_of(reader: asyncio.StreamReader) -> str:
    """The status of the next answer; of none ``closed``."""
    line = await reader.readline()
    return line.split(b" ")[1].decode() if line.startswith(b"HTTP/1.") else "closed"


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return HEAD % (path.encode(), JSON, len(data)) + data


# -- the acts ------------------------------------------------------------------------------------


async def silent(target: Target) -> str:
    async with target.open() as (reader, _):
        return await status_of(reader)


async def half_head(target: Target) -> str:
    """A byte of it a second."""
    async with target.open() as (reader, writer):
        writer.write(b"POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\nx-a: ")
        answer = asyncio.ensure_future(status_of(reader))
        try:
            while not answer.done():
                writer.write(b"a")
                await asyncio.wait([answer], timeout=1.0)
            return await answer
        finally:
            answer.cancel()


async def half_body(target: Target) -> str:
    """Of a size that the proxy holds until all is there."""
    async with target.open() as (reader, writer):
        writer.write(HEAD % (EDITS.encode(), JSON, 500_000) + bytes(250_000))
        return await status_of(reader)


async def half_large_body(target: Target) -> str:
    """Of one that goes on to a replica as it comes."""
    async with target.open() as (reader, writer):
        writer.write(HEAD % (EDITS.encode(), JSON, 10_000_000) + bytes(3_000_000))
        return await status_of(reader)


async def upload(target: Target) -> str:
    body = target.bodies[target.rng.choice(sorted(target.bodies))]
    media_type = b"multipart/form-data; boundary=%s" % BOUNDARY
    async with target.open() as (reader, writer):
        writer.write(HEAD % (EDITS.encode(), media_type, len(body)))
        writer.write(body)
        return await status_of(reader)


async def hostile_head(target: Target) -> str:
    async with target.open() as (reader, writer):
        writer.write(HOSTILE[target.rng.choice(sorted(HOSTILE))])
        writer.write_eof()
        return await status_of(reader)


async def open_and_drop(target: Target) -> str:
    """Before anything is said, in the middle of a head, or with a picture on its way."""
    whole = request(PATH, DRAW | {"num_inference_steps": 4})
    sent = whole[: target.rng.choice((0, 20, len(whole) - 5, len(whole)))]
    async with target.open() as (_, writer):
        writer.write(sent)
        await asyncio.sleep(target.rng.choice((0.0, 0.005, 0.05)))
    return "dropped"


async def unread_stream(target: Target) -> str:
    body = DRAW | {"n": 4, "size": "128x128", "stream": True, "partial_images": 3}
    async with target.open() as (_, writer):
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        cast(asyncio.Transport, writer.transport).pause_reading()
        writer.write(request(PATH, body | {"num_inference_steps": 4}))
        await asyncio.sleep(target.rng.uniform(2, 20))
    return "dropped"


async def scrape(target: Target) -> str:
    async with target.open() as (reader, writer):
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        status = await status_of(reader)
        while await reader.read(2**16):
            pass
        return status


async def live_session(target: Target) -> str:
    phase = target.rng.choice(PHASES)
    return await dropped_session(target.url, phase)


async def dropped_session(url: str, phase: str) -> str:
    """A live session that ends without a goodbye in one of `PHASES`; why it was not let in."""
    values = {**DRAW, "num_inference_steps": 4, "type": "session.update"}
    try:
        async with connect(
            address_of(url),
            subprotocols=[Subprotocol(PROTOCOL)],
            local_addr=(ABUSER, 0),
            max_size=2**26,
        ) as session:
            if phase != "fresh":
                await session.send(msgpack.packb(values))
                await session.recv()
            for number in range({"drawing": 1, "superseded": 5, "unread": 30}.get(phase, 0)):
                await session.send(msgpack.packb({"type": "frame", "id": number}))
            if phase == "unread":
                session.transport.pause_reading()
                await asyncio.sleep(1.0)
            session.transport.abort()
    except WebSocketException as error:
        return type(error).__name__
    return f"dropped {phase}"


# -- all of them ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """So many at a time do it again and again, with a pause between two acts of each."""

    act: Callable[[Target], Awaitable[str]]
    at_a_time: int
    pause_s: float
    most: int = 20_000  # acts in all


KINDS = {
    "silent connections": Kind(silent, 24, 0.1),
    "heads that never end": Kind(half_head, 16, 0.1),
    "half bodies": Kind(half_body, 16, 0.1),
    "half bodies above 1 MiB": Kind(half_large_body, 8, 0.1),
    "large uploads": Kind(upload, 4, 0.5),
    "hostile heads": Kind(hostile_head, 4, 0.05),
    "rapid open and drop": Kind(open_and_drop, 4, 0.05),
    "streams that nobody reads": Kind(unread_stream, 2, 1.0),
    "scrapes": Kind(scrape, 8, 0.02),
    "live sessions, dropped": Kind(live_session, 4, 0.2),
}
