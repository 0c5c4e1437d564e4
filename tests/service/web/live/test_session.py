"""A live session as clients see it: frames in, pictures out, the newest first."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.testclient import WebSocketTestSession
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from service.access.keys import make_key
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from service.web.live.messages import PROTOCOL
from tests.engines.peers import Peer, psnr_db, recipe
from tests.waiting import wait_for

PATH = "/v1/realtime/images"
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
ASKED = {
    "prompt": "a red cube", "seed": 5, "num_inference_steps": 3, "guidance_scale": 3.0,
    "output_format": "png",
}  # fmt: skip


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def say(session: WebSocketTestSession, kind: str, **values: Any) -> None:
    session.send_bytes(msgpack.packb({"type": kind, **values}))


def hear(session: WebSocketTestSession) -> dict[str, Any]:
    return msgpack.unpackb(session.receive_bytes())  # type: ignore[no-any-return]


def pixels_of(message: dict[str, Any]) -> np.ndarray:
    assert message["type"] == "frame", message
    return np.asarray(Image.open(io.BytesIO(message["image"])))


@pytest.fixture
def session(http: TestClient) -> Iterator[WebSocketTestSession]:
    with http.websocket_connect(PATH, subprotocols=[PROTOCOL]) as session:
        assert session.accepted_subprotocol == PROTOCOL
        say(session, "session.update", **ASKED)
        assert hear(session)["values"]["seed"] == 5
        yield session


def test_a_frame_without_a_picture_is_what_diffusers_draws(
    session: WebSocketTestSession, lcm_checkpoint: Path
) -> None:
    say(session, "frame", id=1)
    found = hear(session)
    assert (found["id"], found["seed"], found["steps"], found["dropped"]) == (1, 5, 3, 0)
    wanted = recipe(num_steps=3, guidance_scale=3.0, seed=5)
    assert psnr_db(pixels_of(found), Peer(lcm_checkpoint).draw(wanted).pixels) >= 50


def test_a_frame_with_a_picture_is_an_edit(
    session: WebSocketTestSession, lcm_checkpoint: Path
) -> None:
    say(session, "frame", id="a", image=png(PHOTO), strength=0.7)
    wanted = recipe(num_steps=3, guidance_scale=3.0, seed=5, image=PHOTO, strength=0.7)
    assert psnr_db(pixels_of(hear(session)), Peer(lcm_checkpoint).draw(wanted).pixels) >= 50


def test_a_mask_keeps_the_rest_equal_to_the_byte(session: WebSocketTestSession) -> None:
    mask = np.zeros_like(PHOTO)
    mask[16:48, 16:48] = 255
    say(session, "frame", id=1, image=png(PHOTO), mask=png(mask))
    drawn = pixels_of(hear(session))
    assert np.array_equal(drawn[mask == 0], PHOTO[mask == 0])
    assert not np.array_equal(drawn, PHOTO)


def test_json_says_the_same(http: TestClient) -> None:
    with http.websocket_connect(PATH) as session:
        session.send_text(json.dumps({"type": "session.update", **ASKED}))
        assert json.loads(session.receive_text())["type"] == "session"
        image = base64.b64encode(png(PHOTO)).decode()
        session.send_text(json.dumps({"type": "frame", "id": 1, "image": image, "strength": 0.7}))
        found = json.loads(session.receive_text())
        session.send_bytes(
            msgpack.packb({"type": "frame", "id": 2, "image": png(PHOTO), "strength": 0.7})
        )
        assert hear(session)["image"] == base64.b64decode(found["image"])


def test_the_newest_frame_wins(session: WebSocketTestSession) -> None:
    """Each frame is answered once, in any of two ways, and the last one is drawn."""
    for number in range(30):
        say(session, "frame", id=number)
    answers = [hear(session) for _ in range(30)]
    assert sorted(answer["id"] for answer in answers) == list(range(30))
    drawn = [answer["id"] for answer in answers if answer["type"] == "frame"]
    skipped = [answer for answer in answers if answer["type"] == "skipped"]
    assert drawn == sorted(drawn)
    assert drawn[-1] == 29
    assert len(skipped) > 10
    assert {answer["reason"] for answer in skipped} == {"superseded"}
    dropped = sum(answer["dropped"] for answer in answers if answer["type"] == "frame")
    assert dropped == len(skipped)


def test_pictures_that_are_alike_are_skipped_where_asked(session: WebSocketTestSession) -> None:
    say(session, "session.update", similarity=0.99, strength=0.7)
    hear(session)
    nearly = PHOTO.copy()
    nearly[0, 0] ^= 1
    for number, picture in enumerate((PHOTO, nearly, np.invert(PHOTO))):
        say(session, "frame", id=number, image=png(picture))
        answer = hear(session)
        if number == 1:
            assert (answer["type"], answer["reason"]) == ("skipped", "similar")
        else:
            assert answer["type"] == "frame"
    say(session, "frame", id=3, image=png(np.invert(PHOTO)), prompt="a blue cube")
    assert hear(session)["type"] == "frame", "of another prompt"


def test_a_frame_is_like_the_last_one_only_if_all_of_it_is(session: WebSocketTestSession) -> None:
    """A mask, its kind and its seed count; and what was superseded has not been seen."""
    say(session, "session.update", similarity=0.5, strength=0.7)
    hear(session)
    masks = [np.zeros_like(PHOTO), np.zeros_like(PHOTO)]
    masks[0][:16], masks[1][32:] = 255, 255
    black = png(np.zeros_like(PHOTO))
    frames: list[tuple[dict[str, Any], bool]] = [
        ({}, False), ({}, True), ({"image": black}, False), ({"image": black}, True),
        ({"image": png(PHOTO)}, False), ({"image": png(PHOTO), "mask": png(masks[0])}, False),
        ({"image": png(PHOTO), "mask": png(masks[0])}, True),
        ({"image": png(PHOTO), "mask": png(masks[1])}, False), ({}, False),
        ({"seed": None}, False), ({"seed": None}, False),
    ]  # fmt: skip
    for number, (values, skipped) in enumerate(frames):
        say(session, "frame", id=number, **values)
        assert (hear(session)["type"] == "skipped") is skipped, number


def test_what_was_superseded_has_not_been_seen(session: WebSocketTestSession) -> None:
    say(session, "session.update", similarity=0.9, num_inference_steps=8)
    hear(session)
    for number in range(4):
        say(session, "frame", id=number, image=png(PHOTO))
    answers = {answer["id"]: answer for answer in (hear(session) for _ in range(4))}
    drawn = [number for number, answer in answers.items() if answer["type"] == "frame"]
    similar = [n for n, answer in answers.items() if answer.get("reason") == "similar"]
    assert drawn
    assert min(similar, default=4) > min(drawn)


def test_the_end_of_a_slide_is_drawn(session: WebSocketTestSession) -> None:
    say(session, "session.update", similarity=0.5, prompt_blend=2)
    hear(session)
    for number, prompt in enumerate(["a red cube"] + ["a blue sphere"] * 3):
        say(session, "frame", id=number, prompt=prompt)
        assert (hear(session)["type"] == "skipped") is (number == 3), number


def test_a_new_prompt_slides_in(session: WebSocketTestSession, lcm_checkpoint: Path) -> None:
    say(session, "session.update", prompt_blend=2)
    hear(session)
    say(session, "frame", id=0)
    first = pixels_of(hear(session))
    say(session, "session.update", prompt="a blue sphere")
    hear(session)
    pictures = []
    for number in (1, 2, 3):
        say(session, "frame", id=number)
        pictures.append(pixels_of(hear(session)))
    between, last, still = pictures
    assert not np.array_equal(between, first)
    assert not np.array_equal(between, last)
    assert np.array_equal(last, still)
    wanted = recipe(prompt="a blue sphere", num_steps=3, guidance_scale=3.0, seed=5)
    assert psnr_db(last, Peer(lcm_checkpoint).draw(wanted).pixels) >= 50


def test_a_picture_between_two_prompts_stays_there(session: WebSocketTestSession) -> None:
    pictures = {}
    for share in (0.0, 0.5, 1.0):
        say(session, "session.update", prompt_b="a blue sphere", prompt_b_share=share)
        hear(session)
        say(session, "frame", id=0)
        pictures[share] = pixels_of(hear(session))
    say(session, "frame", id=1, prompt="a blue sphere", prompt_b=None)
    assert np.array_equal(pixels_of(hear(session)), pictures[1.0])
    say(session, "frame", id=2, prompt_b_share=0.0)
    assert np.array_equal(pixels_of(hear(session)), pictures[0.0])
    between = pictures[0.5]
    assert not any(np.array_equal(between, pictures[end]) for end in (0.0, 1.0))
    say(session, "frame", id=3, prompt_b_share=0.5)
    assert np.array_equal(pixels_of(hear(session)), between), "it holds"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"type": "draw"}, "type is \"draw\"; it must be 'session.update' or 'frame'"),
        ({"type": "session.update", "strength": {b"a": 1}}, "strength is {b'a': 1}: input should"),
        (
            '{"type": "session.update", "strength": ' + "[" * 500 + "]" * 500 + "}",
            "strength is [[[",
        ),
        ({"type": "frame"}, "id is missing"),
        ({"type": "frame", "id": 1, "image": "?"}, "image is neither bytes nor base64"),
        ({"type": "frame", "id": 1, "mask": png(PHOTO)}, "mask says what to edit of an image;"),
        ({"type": "frame", "id": 1, "n": 2}, "unknown field 'n'; a live session has prompt"),
        ({"type": "session.update", "prompt_b": "x" * 4001}, "prompt_b is 4001 characters; at m"),
        ({"type": "session.update", "prompt": "x" * 4001}, "prompt is 4001 characters; at most"),
        ({"type": "session.update", "timesteps": [[]] * 65}, "the message is not MessagePack: it"),
        ('{"timesteps": [' + "[]," * 70_000 + "[]]}", "the JSON has about 140004 values; at most"),
        ({1: 2}, "the message is not MessagePack: int is not allowed for map key"),
        ({"type": "session.update", "max_fps": 0}, "max_fps is 0: input should be greater than 0"),
        ({"type": "session.update", "strength": 2}, "strength is 2: input should be less than or"),
        ({"type": "frame", "id": 1, "num_inference_steps": 999}, "num_inference_steps is 999"),
        ({"type": "frame", "id": 1, "image": b"GIF89a"}, "image is a file of the format GIF"),
        ([], "a message is one object"),
        ('{"type": "frame", "id": 10000000000000000000000000}', "id is missing, or no integer"),
        ('{"type": "frame", "id": "\\ud800"}', "the message is not JSON"),
        ({"type": "session.update", "seed": msgpack.ExtType(1, b"x")}, "the message is not Mess"),
    ],
)
def test_what_is_wrong_is_said_and_the_session_goes_on(
    session: WebSocketTestSession, message: object, said: str
) -> None:
    if isinstance(message, str):
        session.send_text(message)
        answer = json.loads(session.receive_text())
    else:
        session.send_bytes(msgpack.packb(message))
        answer = hear(session)
    assert answer["type"] == "error"
    assert answer["error"]["message"].startswith(said)
    assert answer["error"]["type"] == "invalid_request_error"
    named = isinstance(message, dict) and isinstance(message.get("id"), int)
    assert answer.get("id") == (1 if named else None)
    say(session, "frame", id=7)
    assert hear(session)["id"] == 7


def test_an_update_is_checked_before_there_is_a_prompt(http: TestClient) -> None:
    with http.websocket_connect(PATH) as session:
        say(session, "session.update", strength=2)
        assert hear(session)["error"]["message"].startswith("strength is 2")
        say(session, "session.update", strength=0.5)
        assert hear(session)["values"]["strength"] == 0.5
        say(session, "frame", id=1)
        assert hear(session)["error"]["message"].startswith("prompt is required")


def test_sessions_that_are_dropped_leave_nothing(lcm_checkpoint: Path, cache_dir: Path) -> None:
    """At every phase: fresh, told of a prompt, with a frame on its way, with several."""
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    replica = Replica(load_settings(values))
    with TestClient(build_app(replica)) as http:
        assert http.portal is not None
        num_tasks = http.portal.call(_num_tasks)
        for turn in range(100):
            with http.websocket_connect(PATH) as session:
                if turn % 4 > 0:
                    say(session, "session.update", **ASKED)
                for number in range(turn % 4):
                    say(session, "frame", id=number)
        wait_for(lambda: not replica.loop._ledger.open, "the last row leaves")
        assert open_sessions(http) == 0
        assert http.portal.call(_num_tasks) <= num_tasks


async def _num_tasks() -> int:
    return len(asyncio.all_tasks())


def test_who_does_not_read_gets_nothing_more_drawn_and_is_let_go(
    lcm_checkpoint: Path, cache_dir: Path
) -> None:
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    replica = Replica(load_settings(values | {"live_idle_s": 3}))
    replica.start()
    app = build_app(replica)
    sent: list[Message] = []

    async def run() -> None:
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        stuck = asyncio.Event()

        async def send(message: Message) -> None:
            """As a socket's whose buffers are full from the first picture on."""
            sent.append(message)
            if b"image" in message.get("bytes", b""):
                stuck.set()
                await asyncio.sleep(3600)

        inbox.put_nowait({"type": "websocket.connect"})
        for message in ({"type": "session.update", **ASKED}, {"type": "frame", "id": 0}):
            inbox.put_nowait({"type": "websocket.receive", "bytes": msgpack.packb(message)})
        scope = {"type": "websocket", "path": PATH, "headers": [], "query_string": b""}
        serving = asyncio.ensure_future(app(scope, inbox.get, send))
        await stuck.wait()
        for number in range(1, 100):
            frame = msgpack.packb({"type": "frame", "id": number})
            inbox.put_nowait({"type": "websocket.receive", "bytes": frame})
        for _ in range(20):
            await asyncio.sleep(0.05)
            assert not replica.loop._ledger.open, "it is drawn for"
        assert inbox.qsize() > 90, "nor is it read from"
        async with asyncio.timeout(30):
            await serving

    try:
        asyncio.run(run())
    finally:
        replica.close()
    assert sum(b"image" in message.get("bytes", b"") for message in sent) == 1


def open_sessions(http: TestClient) -> float:
    text = http.get("/metrics").text
    (line,) = (each for each in text.splitlines() if each.startswith("fourstep_live_sessions{"))
    return float(line.rpartition(" ")[2])


def ended(session: WebSocketTestSession) -> tuple[int, str]:
    """Why the service closes it, after what it may still say."""
    try:
        while True:
            session.receive_bytes()
    except WebSocketDisconnect as closed:
        return closed.code, closed.reason


def refused(http: TestClient, path: str = PATH, **options: Any) -> tuple[int, str]:
    with http.websocket_connect(path, **options) as session:
        return ended(session)


@pytest.mark.parametrize(("origin", "code"), [
    ("http://testserver", None), ("https://shop.example", None),
    ("https://evil.example", 1008), ("null", 1008), ("http://testserver.evil.example", 1008),
])  # fmt: skip
def test_pages_of_elsewhere_draw_where_they_are_let(
    lcm_checkpoint: Path, cache_dir: Path, origin: str, code: int | None
) -> None:
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    settings = load_settings(values | {"cors_origins": ("https://shop.example",)})
    with TestClient(build_app(Replica(settings))) as http:
        headers = {"origin": origin}
        if code is not None:
            found, reason = refused(http, headers=headers)
            assert (found, reason.endswith("cors_origins names those who may")) == (code, True)
            return
        with http.websocket_connect(PATH, headers=headers) as session:
            say(session, "session.update", **ASKED)
            assert hear(session)["type"] == "session"


def test_keys_and_tokens(lcm_checkpoint: Path, cache_dir: Path, tmp_path: Path) -> None:
    key, line = make_key("studio")
    file = tmp_path / "keys"
    file.write_text(line)
    settings = load_settings(
        {
            "model": str(lcm_checkpoint),
            "engine": "onnxruntime",
            "cache_dir": cache_dir,
            "api_keys_file": file,
            "max_live_sessions_of_key": 1,
        }
    )
    with TestClient(build_app(Replica(settings))) as http:
        assert refused(http)[0] == 1008
        assert http.post("/v1/realtime/tokens").status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        answer = http.post("/v1/realtime/tokens", headers=headers).json()
        assert answer["expires_in"] == 60
        token = answer["token"]
        assert key not in token
        forged = token[:-1] + ("0" if token[-1] != "0" else "1")
        for wrong in (forged, f"{token}%C3%A9", "studio.1.%C3%A9", "%00", ""):
            assert refused(http, f"{PATH}?token={wrong}")[0] == 1008
        with http.websocket_connect(f"{PATH}?token={token}") as session:
            say(session, "session.update", **ASKED)
            assert hear(session)["type"] == "session"
            code, reason = refused(http, headers=headers)
            assert (code, reason) == (
                1013, "this API key has 1 live sessions open, which is all it may have",
            )  # fmt: skip
            say(session, "frame", id=1)
            assert hear(session)["type"] == "frame"
            file.write_text(make_key("studio")[1])  # the same name's, and another
            time.sleep(1.1)  # the file is looked at once a second
            say(session, "frame", id=2)
            code, reason = ended(session)
            assert (code, reason) == (1008, "this API key is not known here any more")


def test_sessions_go_elsewhere_when_the_replica_shuts_down(
    lcm_checkpoint: Path, cache_dir: Path
) -> None:
    """With 1012, at once, whether they wait for a frame or have one drawn; none comes in."""
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    replica = Replica(load_settings(values))
    with TestClient(build_app(replica)) as http:
        with http.websocket_connect(PATH) as quiet, http.websocket_connect(PATH) as busy:
            say(busy, "session.update", **ASKED)
            hear(busy)
            say(busy, "frame", id=1)
            replica.drain()
            for session in (quiet, busy):
                assert ended(session)[0] == 1012
        assert refused(http) == (1012, "this replica is shutting down; come back, to another")
        wait_for(lambda: not replica.loop._ledger.open, "the last row leaves")


def test_a_silent_session_ends(lcm_checkpoint: Path, cache_dir: Path) -> None:
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    settings = load_settings(values | {"live_idle_s": 0.2})
    with TestClient(build_app(Replica(settings))) as http:
        assert refused(http) == (1000, "nothing came for 0.2 s")
