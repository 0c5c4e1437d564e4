"""Every field of ``POST /v1/videos``, given wrong values, and every other way to be refused: the
exact error, word for word. What clips share with images is held to the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from service.web.schema import DrawParams
from service.web.videos.schema import VideoForm, VideoRequest
from tests.service.web.test_bad_input import (
    AS_INTEGER,
    AS_NUMBER,
    FINITE,
    FORM_FIELDS,
    INTEGER,
    JSON_FIELDS,
    NUMBER,
    STRING,
    assert_error,
    one_of,
    rows,
)
from tests.service.web.videos.conftest import client_of, headers_of, replica_client

VIDEOS = "/v1/videos"
SECONDS = "string should match pattern '^[0-9]{1,4}(\\.[0-9]{1,3})?$'"
FORMATS = one_of("mp4", "webp", "gif")
LONGEST = (
    "this model draws 1 to 8 frames, which are 1 s at 8 a second; send that at most, or a lower fps"
)
NO_QUALITY = (
    "output_compression is 50 but output_format is 'gif', which has none; use mp4 or webp, or "
    "leave it out"
)
NO_REFERENCE = (
    "input_reference is given; clips are drawn from text alone here, leave it out (POST "
    "/v1/images/edits draws pictures from pictures, with a model that does)"
)
OF_CLIPS: dict[str, list[tuple[Any, str]]] = {
    "seconds": [
        (1, f"seconds is 1: {STRING}"),
        ("one", f'seconds is "one": {SECONDS}'),
        ("-1", f'seconds is "-1": {SECONDS}'),
        ("1e3", f'seconds is "1e3": {SECONDS}'),
        ("4", f"seconds is '4' at 8 frames a second: 32 frames; {LONGEST}"),
        ("0", f"seconds is '0' at 8 frames a second: 0 frames; {LONGEST}"),
    ],
    "num_frames": [
        (0, "num_frames is 0: input should be greater than or equal to 1"),
        (1.5, f"num_frames is 1.5: {INTEGER}"),
        ("2", f'num_frames is "2": {INTEGER}'),
        (9, f"num_frames is 9; {LONGEST}"),
    ],
    "fps": [
        (0.5, "fps is 0.5: input should be greater than or equal to 1"),
        (61, "fps is 61: input should be less than or equal to 60"),
        ("8", f'fps is "8": {NUMBER}'),
        (float("nan"), f"fps is NaN: {FINITE}"),
    ],
    "output_format": [
        ("png", f'output_format is "png": {FORMATS}'),
        ("MP4", f'output_format is "MP4": {FORMATS}'),
    ],
    "output_compression": [
        (101, "output_compression is 101: input should be less than or equal to 100"),
        (-1, "output_compression is -1: input should be greater than or equal to 0"),
    ],
    "input_reference": [
        ("x.png", 'input_reference is "x.png": input should be an object'),
        ({"image_url": "data:image/png;base64,AAAA"}, NO_REFERENCE),
        ({"file_id": "file-abc"}, NO_REFERENCE),
        ({}, NO_REFERENCE),
    ],
}
FORM_OF_CLIPS: dict[str, list[tuple[str, str]]] = {
    "seconds": [
        ("one", f'seconds is "one": {SECONDS}'),
        ("4", f"seconds is '4' at 8 frames a second: 32 frames; {LONGEST}"),
    ],
    "num_frames": [
        ("two", f'num_frames is "two": {AS_INTEGER}'),
        ("9", f"num_frames is 9; {LONGEST}"),
    ],
    "fps": [
        ("fast", f'fps is "fast": {AS_NUMBER}'),
        ("inf", f'fps is "inf": {FINITE}'),
    ],
    "output_format": [("png", f'output_format is "png": {FORMATS}')],
    "output_compression": [("high", f'output_compression is "high": {AS_INTEGER}')],
}
SHARED = set(DrawParams.model_fields)
ALL_JSON = {name: table for name, table in JSON_FIELDS.items() if name in SHARED} | OF_CLIPS
ALL_FORM = {name: table for name, table in FORM_FIELDS.items() if name in SHARED} | FORM_OF_CLIPS


@pytest.fixture(scope="module")
def http(clip_settings: dict[str, Any]) -> Iterator[TestClient]:
    limits = {"max_steps": 20, "max_prompt_chars": 500, "long_prompt": "refuse"}
    limits |= {"request_timeout_s": 60, "video_timeout_s": 600}
    with replica_client(clip_settings | limits) as client:
        client.headers = headers_of()
        yield client


def wrong(answer: httpx.Response, message: str, field: str | None, code: str = "") -> None:
    code = code or ("unsupported_parameter" if message == NO_REFERENCE else "invalid_value")
    assert_error(answer, message.replace("tiny-lcm", "tiny-clips"), field, code)


def test_every_field_has_a_row() -> None:
    assert set(ALL_JSON) == set(VideoRequest.model_fields)
    assert set(ALL_FORM) == set(VideoForm.model_fields)


@pytest.mark.parametrize(("field", "value", "message"), rows(ALL_JSON))
def test_wrong_values_in_json(http: TestClient, field: str, value: Any, message: str) -> None:
    wrong(http.post(VIDEOS, content=json.dumps({"prompt": "x"} | {field: value})), message, field)


@pytest.mark.parametrize(("field", "value", "message"), rows(ALL_FORM))
def test_wrong_values_in_forms(http: TestClient, field: str, value: str, message: str) -> None:
    form = {name: (None, each) for name, each in ({"prompt": "x"} | {field: value}).items()}
    wrong(http.post(VIDEOS, files=form), message, field)


BODIES: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "prompt is required", "prompt", "missing_required_parameter"),
    ({"prompt": "x", "frames": 3}, "unknown field 'frames'; did you mean 'num_frames'?",
     "frames", "unknown_parameter"),
    ({"prompt": "x", "num_frame": 3}, "unknown field 'num_frame'; did you mean 'num_frames'?",
     "num_frame", "unknown_parameter"),
    ({"prompt": "x", "n": 2}, "unknown field 'n'", "n", "unknown_parameter"),
    ({"prompt": "x", "seconds": "1", "num_frames": 3}, "seconds is '1' at 8 frames a second: 8 "
     "frames, and num_frames is 3; send one of them", "num_frames", ""),
    ({"prompt": "x", "output_compression": 50, "output_format": "gif"}, NO_QUALITY,
     "output_compression", ""),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message", "field", "code"), BODIES)
def test_wrong_bodies(
    http: TestClient, body: dict[str, Any], message: str, field: str, code: str
) -> None:
    wrong(http.post(VIDEOS, json=body), message, field, code)


TIMEOUT = "which no image takes less than, to"
HEADERS: list[tuple[dict[str, str], str, str | None]] = [
    ({"x-request-timeout": "601"},
     f"X-Request-Timeout is '601'; it must be seconds from 0.001, {TIMEOUT} 600",
     "X-Request-Timeout"),
    ({"x-request-timeout": "61", "accept": "video/mp4"},
     f"X-Request-Timeout is '61'; it must be seconds from 0.001, {TIMEOUT} 60",
     "X-Request-Timeout"),
    ({"accept": "image/gif"},
     "output_format is 'mp4' but the Accept header asks for 'gif'; send one of them",
     "output_format"),
    ({"content-type": "text/plain"},
     'the Content-Type is "text/plain"; it must be multipart/form-data, or application/json', None),
    ({"content-encoding": "gzip"},
     'the Content-Encoding is "gzip"; compressed bodies are not read, send it uncompressed and '
     "without that header", None),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "message", "field"), HEADERS)
def test_wrong_headers(
    http: TestClient, headers: dict[str, str], message: str, field: str | None
) -> None:
    body = json.dumps({"prompt": "x", "output_format": "mp4"})
    wrong(http.post(VIDEOS, content=body, headers=headers), message, field)


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_picture_to_start_from_is_refused_as_openais_client_sends_it(http: TestClient) -> None:
    client = client_of(http)
    with pytest.raises(openai.BadRequestError, match="clips are drawn from text alone"):
        client.videos.create(prompt="x", input_reference=b"a file")
    for name in ("input_reference", "input_reference[image_url]", "input_reference[file_id]"):
        form = {"prompt": (None, "x"), name: (None, "y")}
        wrong(http.post(VIDEOS, files=form), NO_REFERENCE, "input_reference")
    for call in (
        lambda: client.videos.remix("video_x", prompt="x"),
        lambda: client.videos.edit(prompt="x", video=b"a file"),
        lambda: client.videos.extend(prompt="x", seconds="4", video=b"a file"),
        lambda: client.videos.create_character(name="x", video=b"x"),
    ):
        with pytest.raises(openai.BadRequestError, match="by POST /v1/videos") as caught:
            call()
        assert caught.value.code == "unsupported_endpoint"


def test_an_empty_reference_is_none(http: TestClient) -> None:
    form = [("prompt", (None, "")), ("input_reference", ("", b"")), ("fps", (None, ""))]
    message = 'prompt is "": string should have at least 1 character'
    wrong(http.post(VIDEOS, files=form), message, "prompt")  # and nothing of the others


QUERIES: list[tuple[str, str, str]] = [
    ("?limit=0", 'limit is "0": input should be greater than or equal to 1', "limit"),
    ("?limit=101", 'limit is "101": input should be less than or equal to 100', "limit"),
    ("?limit=x", f'limit is "x": {AS_INTEGER}', "limit"),
    ("?order=up", 'order is "up": input should be \'asc\' or \'desc\'', "order"),
    ("?after=x", "after is 'x', which is none of your videos; it may be expired, list from the "
     "beginning", "after"),
    ("/video_x/content?variant=all",
     "variant is \"all\": input should be 'video', 'thumbnail' or 'spritesheet'", "variant"),
]  # fmt: skip


@pytest.mark.parametrize(("query", "message", "field"), QUERIES)
def test_wrong_queries(http: TestClient, query: str, message: str, field: str) -> None:
    wrong(http.get(f"{VIDEOS}{query}"), message, field)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "", "GET, POST"),
        ("POST", "/video_x", "DELETE, GET"),
        ("POST", "/video_x/content", "GET"),
    ],
)
def test_other_methods_are_told_which_there_are(
    http: TestClient, method: str, path: str, allowed: str
) -> None:
    answer = http.request(method, f"{VIDEOS}{path}")
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_a_clip_counts_as_its_frames_for_a_key(
    clip_settings: dict[str, Any], tmp_path: Path
) -> None:
    keys = clip_settings["api_keys_file"].read_text().splitlines()
    limited = tmp_path / "keys"
    limited.write_text(f"{keys[0]} images_per_minute=12 max_open_images=4\n")
    with replica_client(clip_settings | {"api_keys_file": limited}) as http:
        answer = http.post(VIDEOS, json={"prompt": "x"}, headers=headers_of())
        wrong(answer, "num_frames is 8; this API key may have 4 images at a time", "num_frames")
        headers = headers_of(accept="image/gif")
        body = {"prompt": "x", "num_frames": 4, "num_inference_steps": 1}
        statuses = [http.post(VIDEOS, json=body, headers=headers).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]


def test_a_model_of_pictures_says_where_to_go(lcm_checkpoint: Path, cache_dir: Path) -> None:
    settings = {"model": str(lcm_checkpoint), "engine": "torch", "cache_dir": cache_dir}
    with replica_client(settings) as http:
        for headers in ({}, {"accept": "video/mp4"}):
            assert_error(
                http.post(VIDEOS, json={"prompt": "x"}, headers=headers),
                "'tiny-lcm' draws images, and no clips: POST /v1/images/generations",
                "model",
                "unsupported_model",
            )
        assert http.get(VIDEOS).json()["data"] == []
