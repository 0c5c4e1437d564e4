"""Uploads are taken in a few at a time: others are answered meanwhile, and deadlines hold."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from service.access.keys import make_key
from service.errors import DeadlineExceeded, Overloaded
from service.web import api
from service.web.intake import Intake
from tests.service.web.files import saved
from tests.service.web.test_studio import serving

PICTURE = saved(Image.new("RGB", (64, 64), "red"), "PNG")
DRAW = {"prompt": "x", "num_inference_steps": 1}
WAIT_S = 60.0
KEY, LINE = make_key("alice", {"images_per_minute": "1"})


@pytest.fixture(scope="module")
def url(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[str]:
    with serving(model=str(lcm_checkpoint), cache_dir=cache_dir) as found:
        yield found


class Held:
    """Stands in for `decode_picture`: begins, and goes on when it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_begun = 0
        self.may_go_on = threading.Event()
        self._decode = api.decode_picture
        monkeypatch.setattr(api, "decode_picture", self)

    def __call__(self, data: bytes, **options: int) -> object:
        self.num_begun += 1
        assert self.may_go_on.wait(WAIT_S)
        return self._decode(data, **options)


def upload(url: str, **headers: str) -> httpx.Response:
    fields = {key: str(value) for key, value in DRAW.items()} | {"strength": "1"}
    return httpx.post(
        f"{url}/v1/images/edits",
        data=fields,
        files={"image": ("a.png", PICTURE, "image/png")},
        headers=headers,
        timeout=WAIT_S,
    )


def test_others_are_answered_while_uploads_wait(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        uploads = [pool.submit(upload, url) for _ in range(8)]
        try:
            while held.num_begun == 0:
                time.sleep(0.01)
            answer = httpx.post(f"{url}/v1/images/generations", json=DRAW, timeout=WAIT_S)
            assert answer.status_code == 200
            assert held.num_begun == 1, "at a time"
        finally:
            held.may_go_on.set()
        assert [each.result().status_code for each in uploads] == [200] * 8


def test_a_deadline_holds_while_an_upload_waits(
    lcm_checkpoint: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    # A service of its own: one that has seen slow uploads would refuse what must wait.
    fresh = serving(model=str(lcm_checkpoint), cache_dir=cache_dir)
    with fresh as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(upload, url)
        try:
            while held.num_begun == 0:
                time.sleep(0.01)
            late = upload(url, **{"x-request-timeout": "0.5"})
        finally:
            held.may_go_on.set()
        assert first.result().status_code == 200
        assert upload(url).status_code == 200
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"
    assert "the upload was not decoded by the deadline" in late.json()["error"]["message"]
    assert held.num_begun == 2, "what was late is not begun any more"


def test_an_upload_beyond_a_keys_limit_is_not_decoded(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    held.may_go_on.set()
    keys = tmp_path / "keys"
    keys.write_text(LINE)
    values = {"cache_dir": cache_dir, "api_keys_file": keys}
    with serving(model=str(lcm_checkpoint), **values) as url:
        answers = [upload(url, authorization=f"Bearer {KEY}") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert held.num_begun == 1


def test_a_body_must_come_in_time_and_all_have_a_bound(
    lcm_checkpoint: Path, cache_dir: Path
) -> None:
    values = {"cache_dir": cache_dir, "body_timeout_s": 1, "max_held_bytes": 1024}
    with serving(model=str(lcm_checkpoint), **values) as url:
        address = (urlsplit(url).hostname, urlsplit(url).port)
        with socket.create_connection(address, WAIT_S) as connection:
            head = "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
            connection.sendall(head.encode() + b"{")
            answer = httpx.post(f"{url}/v1/images/generations", json=DRAW, timeout=WAIT_S)
            assert answer.status_code == 200
            large = httpx.post(f"{url}/v1/images/generations", json=DRAW | {"prompt": "x" * 1025})
            answer = connection.recv(65536)
        assert large.status_code == 429
        assert "bytes of bodies are being read, of at most 1024" in large.text
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"1 bytes of the body came within 1 s" in answer
        for _ in range(30):  # what was held has been let go
            answer = httpx.post(f"{url}/v1/images/generations", json=DRAW, timeout=WAIT_S)
            assert answer.status_code == 200


def test_what_would_wait_too_long_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(perf_counter=itertools.count(0, 0.2).__next__)
    monkeypatch.setattr("service.web.intake.time", clock)  # each upload costs 0.2 s

    async def run() -> None:
        intake, may_go_on = Intake(num_workers=1, max_held_bytes=0), threading.Event()
        try:
            await intake.decode(int, left_s=WAIT_S)
            open_one = asyncio.ensure_future(intake.decode(may_go_on.wait, left_s=WAIT_S))
            await asyncio.sleep(0)
            with pytest.raises(
                Overloaded, match="1 uploads are decoded before this one"
            ) as refused:
                await intake.decode(int, left_s=0.3)
            assert refused.value.retry_after_s == pytest.approx(0.4 - 0.27)
            may_go_on.set()
            assert await open_one is True
        finally:
            may_go_on.set()
            intake.close()

    asyncio.run(run())


def test_an_error_passes_and_costs_what_it_costs() -> None:
    async def run() -> None:
        intake = Intake(num_workers=1, max_held_bytes=10)
        with pytest.raises(ZeroDivisionError):
            await intake.decode(lambda: 1 // 0, left_s=WAIT_S)
        with pytest.raises(DeadlineExceeded):
            await intake.decode(lambda: time.sleep(0.2), left_s=0.05)
        intake.hold(10)
        with pytest.raises(Overloaded, match="10 bytes of bodies"):
            intake.hold(1)
        intake.release(10)
        intake.hold(10)
        intake.close()

    asyncio.run(run())
