"""What a session costs: a key's images, and the engine's memory, by themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engines.drawing.drawing import Drawing
from engines.drawing.runner import Runner
from engines.errors import OutOfMemory
from service.access.keys import make_key
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from service.web.live.slide import MAX_TOWARDS, Slide
from tests.service.web.gate import Gate, gated
from tests.service.web.live.test_session import ASKED, PATH, ended, hear, say
from tests.waiting import wait_for


@pytest.fixture
def gate() -> Iterator[Gate]:
    with gated() as gate:
        yield gate


def test_superseded_frames_are_not_counted_as_a_keys_images(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path: Path, gate: Gate
) -> None:
    key, line = make_key("hand", {"images_per_minute": "2"})
    (tmp_path / "keys").write_text(line)
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    replica = Replica(load_settings(values | {"api_keys_file": tmp_path / "keys"}))
    headers = {"authorization": f"Bearer {key}"}
    with (
        TestClient(build_app(replica)) as http,
        http.websocket_connect(PATH, headers=headers) as session,
    ):
        say(session, "session.update", **ASKED | {"num_inference_steps": 50})
        hear(session)
        gate.clear()
        say(session, "frame", id=1)
        gate.reached.wait(60)
        say(session, "frame", id=2)
        wait_for(lambda: any(each.superseded for each in replica.loop._ledger.open), "the second")
        gate.set()
        answers = [hear(session) for _ in range(2)]
        assert [(each["type"], each["id"]) for each in answers] == [("skipped", 1), ("frame", 2)]
        for number, answer in ((3, "frame"), (4, "skipped")):
            say(session, "frame", id=number)
            heard = hear(session)
            assert (heard["type"], heard["id"]) == (answer, number)
        assert heard["reason"] == "shed"


def test_who_waits_for_a_picture_is_not_silent(
    lcm_checkpoint: Path, cache_dir: Path, gate: Gate
) -> None:
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    with (
        TestClient(build_app(Replica(load_settings(values | {"live_idle_s": 2})))) as http,
        http.websocket_connect(PATH) as session,
    ):
        say(session, "session.update", **ASKED)
        hear(session)
        gate.clear()
        say(session, "frame", id=1)
        threading.Timer(3, gate.set).start()
        assert hear(session)["type"] == "frame"
        assert ended(session) == (1000, "nothing came for 2 s")


def test_few_prompts_make_up_a_picture_however_fast_they_change() -> None:
    slide = Slide()
    for number in range(1000):
        prompt, blends = slide.next(f"prompt {number}", 600)
        assert len(blends) == min(number, MAX_TOWARDS)
    assert prompt == f"prompt {999 - MAX_TOWARDS}"
    assert [blend.prompt for blend in blends] == [f"prompt {n}" for n in range(996, 1000)]


def test_a_size_that_finds_no_memory_does_not_end_the_session(
    lcm_checkpoint: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, short = Runner.decode, False

    def decode(runner: Runner, drawings: Sequence[Drawing], *args: Any) -> None:
        if short:
            raise OutOfMemory("no memory for vae_decoder of 1 rows")
        sound(runner, drawings, *args)

    monkeypatch.setattr(Runner, "decode", decode)
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    with (
        TestClient(build_app(Replica(load_settings(values)))) as http,
        http.websocket_connect(PATH) as session,
    ):
        say(session, "session.update", **ASKED)
        hear(session)
        short = True
        say(session, "frame", id=1)
        answer = hear(session)
        assert (answer["type"], answer["id"]) == ("error", 1)
        assert answer["error"]["message"].startswith("the engine has no memory for this (no memory")
        short = False
        say(session, "frame", id=2)
        assert hear(session)["type"] == "frame"
