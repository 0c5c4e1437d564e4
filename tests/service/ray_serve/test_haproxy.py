"""HAProxy with our rules, run for real: whom it waits for, what it lets by, what it says itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from starlette.types import Receive, Scope, Send

from service.ray_serve.environment import free_port, haproxy_available
from service.ray_serve.haproxy import HOST, ConfigError, amend
from service.ray_serve.proxy_rules import MAX_HEAD_BYTES, MAX_URL_BYTES, RESERVED_CONNECTIONS
from service.settings import MIB
from service.web.headers import ALWAYS, MAX_REQUEST_ID_CHARS
from tests.service.ray_serve.proxied import Ports, proxied, rays_config
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(not haproxy_available(), reason="Ray's HAProxy is for Linux alone")

MAXCONN = 128
ONE_ADDRESS = (MAXCONN - RESERVED_CONNECTIONS) // 2  # connections
PATIENCE_S = 20.0  # far above what is waited for here
SHORTER = {
    "timeout client 30s": "timeout client 1s",
    "timeout http-request 10s": "timeout http-request 1s",
    "wait-for-body time 30s": "wait-for-body time 1s",
}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells what it was asked; ``/slow`` after 2.5 s, ``/stream`` with two such pauses."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [(name.decode(), value.decode("latin-1")) for name, value in scope["headers"]]
    told = {"method": scope["method"], "path": scope["path"], "headers": headers}
    if scope["path"] == "/slow":
        await asyncio.sleep(2.5)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(2 if scope["path"] == "/stream" else 0):
        await send({"type": "http.response.body", "body": b" ", "more_body": True})
        await asyncio.sleep(2.5)
    content = json.dumps(told | {"body": body.decode("latin-1")}).encode()
    await send({"type": "http.response.body", "body": content})


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    with proxied(echo, tmp_path_factory.mktemp("haproxy"), maxconn=MAXCONN) as found:
        yield found


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    """The same with a second for everything."""
    with proxied(echo, tmp_path_factory.mktemp("hasty"), SHORTER) as found:
        yield found


def connect(port: int, sent: bytes = b"", *, source: str = "127.0.0.1") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE_S, (source, 0))
    connection.sendall(sent)
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    received = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def is_refused(port: int, source: str) -> bool:
    """Whether a connection ends without an answer to what is asked on it."""
    try:
        return rest_of(connect(port, b"GET / HTTP/1.0\r\n\r\n", source=source)) == b""
    except ConnectionResetError:
        return True


def is_ours(answer: bytes) -> bool:
    """Whether it has the security headers and an error in OpenAI's shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    if not body.startswith(b"{"):
        return False
    error = json.loads(body)["error"]
    return set(error) == {"message", "type", "param", "code"} and all(
        b"%s: %s" % (name, value.lower()) in lines for name, value in ALWAYS.items()
    )


POST = b"POST /v1/images/edits HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /v1/images/edits HTTP/1.1\r\nhost: x\r\n", b"HTTP/1.1 408 "),
        (POST % 100 + b"half of it", b"HTTP/1.1 408 "),
        # More than HAProxy holds: a replica has the first of it.
        (POST % (3 << 20) + bytes(2 << 20), b"HTTP/1.1 400 "),
    ],
    ids=["silent", "half a head", "half a body", "half of a large body"],
)
def test_what_a_client_does_not_finish_ends(hasty: Ports, sent: bytes, answer: bytes) -> None:
    received = rest_of(connect(hasty.clients, sent))
    assert received.startswith(answer)
    assert is_ours(received) == (b"content-length" in sent and answer != b"")


def test_a_client_that_waits_for_its_answer_is_not_idle(hasty: Ports) -> None:
    for path in ("/slow", "/stream"):
        answer = httpx.get(f"http://127.0.0.1:{hasty.clients}{path}", timeout=PATIENCE_S)
        assert answer.json()["path"] == path


def test_a_stream_that_nobody_reads_is_held_up_and_then_ended(tmp_path: Path) -> None:
    ended, num_parts = threading.Event(), 0

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal num_parts
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/-/healthz":
            return await send({"type": "http.response.body"})
        try:
            gone = asyncio.ensure_future(until_gone(receive))
            while not gone.done():
                await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
                num_parts += 1
        finally:
            ended.set()

    async def until_gone(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    with (
        proxied(endless, tmp_path, SHORTER) as ports,
        connect(ports.clients, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"),
    ):
        assert ended.wait(PATIENCE_S)
    assert 0 < num_parts * 2**16 < 64 * 2**20, "what buffers on the way hold, and no more"


def test_memory_that_many_have_used_is_given_back(tmp_path: Path) -> None:
    with proxied(echo, tmp_path, maxconn=512) as ports:
        process = psutil.Process(ports.pid)
        fresh = process.memory_info().rss
        for _ in range(2):  # of the first alone even glibc gives back
            with contextlib.ExitStack() as half_sent:
                for _ in range(200):
                    sent = POST % 1_000_000 + bytes(500_000)
                    half_sent.enter_context(connect(ports.clients, sent))
                wait_for(lambda: process.memory_info().rss > fresh + 80 * MIB, "what they sent")
            wait_for(lambda: process.memory_info().rss < fresh + 40 * MIB, "what was there before")


def test_one_address_leaves_half_to_others_and_nobody_locks_out_probes(ports: Ports) -> None:
    with contextlib.ExitStack() as silent:
        for _ in range(ONE_ADDRESS):
            silent.enter_context(connect(ports.clients, source="127.0.0.2"))
        assert is_refused(ports.clients, "127.0.0.2")
        assert httpx.get(f"http://127.0.0.1:{ports.clients}/").status_code == 200
        for _ in range(ONE_ADDRESS):
            silent.enter_context(connect(ports.clients, source="127.0.0.3"))
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"http://127.0.0.1:{ports.clients}/", timeout=1)
        for path in ("/healthz", "/readyz", "/metrics", "/-/healthz", "/sketch/readyz"):
            answer = httpx.get(f"http://127.0.0.1:{ports.probes}{path}")
            assert answer.status_code == 200, (path, answer.text)
    answer = httpx.get(f"http://127.0.0.1:{ports.probes}/v1/models")
    assert answer.status_code == 404
    assert "/metrics alone" in answer.json()["error"]["message"]


def test_connections_opened_and_dropped_leave_nothing(ports: Ports) -> None:
    """Of one address, at every point of a request, each ended by a reset."""
    process = psutil.Process(ports.pid)
    httpx.get(f"http://127.0.0.1:{ports.clients}/")
    before = process.num_fds()
    whole = POST % 9 + b"something"
    for turn in range(1000):
        with connect(ports.clients, whole[: turn % (len(whole) + 1)], source="127.0.0.4") as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: process.num_fds() <= before, "what was there before")
    for source in ("127.0.0.1", "127.0.0.4"):
        assert not is_refused(ports.clients, source)


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/V1/models", "/%761/models", "/v1/%6dodels", "/v1%2fmodels", "/v1;/models",
     "/x/../v1/models", "/v1/models.", "/v1/models%00"],
)  # fmt: skip
def test_a_path_reaches_the_application_as_it_was_written(ports: Ports, path: str) -> None:
    """Whose API keys go by what it sees: nothing between makes another path of it."""
    sent = b"GET %s HTTP/1.0\r\nhost: x\r\n\r\n" % path.encode()
    (told,) = parts_of(rest_of(connect(ports.clients, sent)))
    assert told["path"] == urllib.parse.unquote(path)


def headers_of(ports: Ports, *headers: tuple[str, bytes]) -> list[list[str]]:
    """What reaches the application of these."""
    answer = httpx.get(f"http://127.0.0.1:{ports.clients}/", headers=list(headers))
    found: list[list[str]] = answer.json()["headers"]
    return found


@pytest.mark.parametrize(
    "name",
    ["X-Request-Timeout-Seconds", "serve-multiplexed-model-id", "serve_multiplexed_model_id",
     "Serve_Multiplexed-Model-Id", "x-session-id", "X_Session_ID", "Sec-WebSocket-Extensions"],
)  # fmt: skip
def test_what_is_not_offered_is_taken_off(ports: Ports, name: str) -> None:
    found = headers_of(ports, (name, b"\xff"), ("x-other", b"kept"))
    assert name.lower() not in [key for key, _ in found]
    assert ["x-other", "kept"] in found


@pytest.mark.parametrize(
    "given",
    [(), (b"\xff",), (b"a" * (MAX_REQUEST_ID_CHARS + 1),), (b"a", b"b"), (b"two words",), (b"",)],
    ids=["none", "not ASCII", "long", "two", "a space", "empty"],
)
def test_a_request_id_that_is_none_gives_way_to_one(ports: Ports, given: tuple[bytes, ...]) -> None:
    found = headers_of(ports, *(("x-request-id", value) for value in given))
    (request_id,) = [value for name, value in found if name == "x-request-id"]
    assert request_id.startswith("req_")


def test_a_request_id_is_kept(ports: Ports) -> None:
    given = "a,b;" + "c" * (MAX_REQUEST_ID_CHARS - 4)
    assert ["x-request-id", given] in headers_of(ports, ("x-request-id", given.encode()))
    answer = httpx.get(f"http://127.0.0.1:{ports.clients}/-/routes", headers={"x-request-id": "m"})
    assert answer.headers["x-request-id"] == "m"
    assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * MAX_URL_BYTES + b" HTTP/1.1\r\nhost: x\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
    ],
    ids=["URL", "head"],
)
def test_heads_are_bounded(ports: Ports, sent: bytes, status: int) -> None:
    with connect(ports.clients, sent) as connection:
        connection.shutdown(socket.SHUT_WR)
        answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert is_ours(answer)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x-a: a\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nbad header: a\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n folded\r\n\r\n",
        b"GET /\r\n",
    ],
    ids=["200 headers", "no header", "TLS", "HTTP/2", "folded", "HTTP/0.9"],
)
def test_what_is_no_request_ends_at_the_proxy(ports: Ports, sent: bytes) -> None:
    with connect(ports.clients, sent) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert rest_of(connection).startswith(b"HTTP/1.1 400 ")


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\n%s\r\n\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\ncontent-length: 38\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 38, 0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: +38\r\n\r\n",
        CHUNKED % b"content-length: 43\r\ntransfer-encoding: chunked",
        CHUNKED % b"transfer-encoding: xchunked",
        CHUNKED % b"transfer-encoding: chunked\r\ntransfer-encoding: identity",
        CHUNKED % b"transfer-encoding: chunked, identity",
        CHUNKED % b"transfer-encoding : chunked",
        CHUNKED % b"transfer-encoding:\x0bchunked",
        CHUNKED % b"x: y\r\n transfer-encoding: chunked",
        b"POST / HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0x0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0;a=\nb\r\n\r\n",
        b"GET / HTTP/1.1\nhost: x\ncontent-length: 38\n\n",
    ],
)
def test_proxy_and_application_see_the_same_requests(ports: Ports, sent: bytes) -> None:
    """What follows is a request of its own, part of the body to both, or nobody's.

    The proxy adds an id to each request that it sees, so one without is the application's alone.
    """
    connection = connect(ports.clients, sent + SMUGGLED)
    connection.shutdown(socket.SHUT_WR)
    told = parts_of(rest_of(connection))
    for part in told:
        names = [name for name, _ in part["headers"]]
        assert names.count("x-request-id") == 1, part
        assert not {"content-length", "transfer-encoding"} <= set(names), part
    assert len(told) <= 2


def parts_of(answers: bytes) -> list[Any]:
    """The JSON objects that the application has answered with."""
    found, decoder, text = [], json.JSONDecoder(), answers.decode("latin-1")
    while (at := text.find('{"method"')) >= 0:
        part, end = decoder.raw_decode(text[at:])
        found.append(part)
        text = text[at + end :]
    return found


def test_the_address_is_ours_to_choose(tmp_path: Path) -> None:
    config = rays_config(tmp_path, 8000, free_port()).read_text()
    amended = amend(config, {HOST: "192.0.2.7"})
    assert "    bind 192.0.2.7:8000 proto h1\n" in amended
    assert "frontend probes" not in amended
    assert amend(amended, {}) == amended, "HAProxy that Ray starts anew finds the file amended"


@pytest.mark.parametrize("line", ["timeout client", "errorfile 503", "frontend http_frontend"])
def test_a_configuration_of_another_form_is_refused(tmp_path: Path, line: str) -> None:
    config = rays_config(tmp_path, 8000, free_port()).read_text().replace(line, "other")
    with pytest.raises(ConfigError, match="HAProxy configuration has"):
        amend(config, {})
