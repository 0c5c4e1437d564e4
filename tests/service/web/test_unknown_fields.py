"""Fields that are none: refused, or, where the service is set so, ignored and told of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from service.replica import Replica
from service.settings import SettingsError, load_settings
from service.web.app import build_app
from tests.engines.checkpoints import make_lora
from tests.service.web.test_api import png
from tests.service.web.test_bad_input import EDITS, GENERATIONS, PNG

UNKNOWN = {"response_modality": "image", "tags": [1, {"a": 2}]}
LORAS = [{"name": "ink", "weight": 0.5, "scale": 2}, {"name": "glow", "note": None}]
IGNORED = [
    "unknown field 'response_modality' was ignored",
    "unknown field 'tags' was ignored",
    "unknown field 'loras.0.scale' was ignored",
    "unknown field 'loras.1.note' was ignored",
]
BODY = {"prompt": "x", "timesteps": [999, 499], "seed": 4, "loras": LORAS} | UNKNOWN
FORM = {
    name: value if isinstance(value, str) else json.dumps(value) for name, value in BODY.items()
}


@pytest.fixture(scope="module")
def http(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("loras")
    loras = {name: make_lora(lcm_checkpoint, folder / name, ["to_q"]) for name in ("ink", "glow")}
    values = {
        "model": str(lcm_checkpoint),
        "engine": "onnxruntime",
        "cache_dir": cache_dir,
        "loras": loras,
        "unknown_fields": "ignore",
    }
    with TestClient(build_app(Replica(load_settings(values)))) as client:
        yield client


def post_form(http: TestClient, *files: str, **more: str) -> httpx.Response:
    parts = [(name, ("x.png", png())) for name in ("image", *files)]
    return http.post(EDITS, data=FORM | more, files=parts)


def completed(answer: httpx.Response) -> dict[str, Any]:
    lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    return dict(json.loads(lines[-1][6:]))


def test_json_answers_name_them(http: TestClient) -> None:
    answer = http.post(GENERATIONS, json=BODY).json()
    assert answer["warnings"] == IGNORED
    assert answer["loras"] == {"ink": 0.5, "glow": 1.0}
    known = {name: value for name, value in BODY.items() if name not in UNKNOWN}
    known["loras"] = [{"name": "ink", "weight": 0.5}, {"name": "glow"}]
    plain = http.post(GENERATIONS, json=known).json()
    assert plain["warnings"] == []
    assert plain["data"] == answer["data"]


def test_so_do_edits_in_both_forms(http: TestClient) -> None:
    assert post_form(http).json()["warnings"] == IGNORED
    body = BODY | {"images": [{"image_url": f"data:image/png;base64,{PNG}", "detail": "low"}]}
    answer = http.post(EDITS, json=body)
    assert answer.json()["warnings"] == [*IGNORED, "unknown field 'images.0.detail' was ignored"]


def test_so_do_streams(http: TestClient) -> None:
    event = completed(http.post(GENERATIONS, json=BODY | {"stream": True}))
    assert event["type"] == "image_generation.completed"
    assert event["warnings"] == IGNORED
    event = completed(post_form(http, stream="true"))
    assert (event["type"], event["warnings"]) == ("image_edit.completed", IGNORED)


def test_so_does_the_head_of_a_raw_image(http: TestClient) -> None:
    answer = http.post(GENERATIONS, json=BODY, headers={"accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-fourstep-warnings"] == "; ".join(IGNORED)


def test_hostile_names_stay_short_and_in_their_header(http: TestClient) -> None:
    names = ["a\r\nset-cookie: x=1", "é", "y" * 900, *(f"f{index}" for index in range(300))]
    body = {"prompt": "x"} | dict.fromkeys(names, 1)
    answer = http.post(GENERATIONS, json=body, headers={"accept": "image/png"})
    assert answer.status_code == 200
    told = answer.headers["x-fourstep-warnings"]
    assert r"unknown field 'a\r\nset-cookie: x=1' was ignored" in told
    assert told.endswith(f"{len(names) - 10} more unknown fields were ignored")
    assert len(told) < 1000
    assert "set-cookie" not in answer.headers
    body = {"prompt": "x"} | {"\U000e0001" * 60 + str(index): 1 for index in range(10)}
    answer = http.post(GENERATIONS, json=body, headers={"accept": "image/png"})
    assert len(answer.headers["x-fourstep-warnings"]) < 1000  # as they are written there


def test_a_long_name_that_stands_twice_is_shown_cut(http: TestClient) -> None:
    name = "y" * 900
    error = http.post(GENERATIONS, content=f'{{"prompt":"x","{name}":1,"{name}":2}}').json()
    assert error["error"]["message"] == f"{'y' * 61}... is given twice; send it once"
    assert error["error"]["param"] == f"{'y' * 61}..."


def test_the_openai_client_may_send_what_it_likes(http: TestClient) -> None:
    client = openai.OpenAI(api_key="none", base_url=f"{http.base_url}/v1", http_client=http)
    answer = client.images.generate(prompt="x", extra_body={"cfg": 7})
    assert answer.model_dump()["warnings"] == ["unknown field 'cfg' was ignored"]


def test_files_of_other_fields_are_ignored_too(http: TestClient) -> None:
    answer = post_form(http, "markup").json()
    assert "unknown field 'markup' was ignored" in answer["warnings"]


def test_known_fields_are_as_strict_as_ever(http: TestClient) -> None:
    def error(answer: httpx.Response) -> tuple[int, str]:
        return answer.status_code, answer.json()["error"]["param"]

    assert error(http.post(GENERATIONS, json=BODY | {"n": "2"})) == (400, "n")
    assert error(http.post(GENERATIONS, json=BODY | {"loras": [{"weight": 1}]})) == (
        400, "loras.0.name",
    )  # fmt: skip
    assert error(post_form(http, "prompt")) == (400, "prompt")
    body = BODY | {"image": PNG, "mask": PNG}
    assert error(http.post(EDITS, json=body)) == (400, "mask")  # it would change the picture


def test_the_setting_is_one_of_two() -> None:
    with pytest.raises(
        SettingsError, match="unknown_fields': input should be 'refuse' or 'ignore'"
    ):
        load_settings({"unknown_fields": "drop"})
