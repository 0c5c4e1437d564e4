"""Edits as JSON: the image in base64 or a `data:` URL draws what the same file in a form does."""

from __future__ import annotations

import base64
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from tests.service.web.test_api import png

EDITS = "/v1/images/edits"
BODY = {"prompt": "a red star", "seed": 3, "strength": 0.5, "n": 2}
TEXT = base64.b64encode(png(100, 70)).decode()
SHAPES: dict[str, dict[str, Any]] = {
    "base64": {"image": TEXT},
    "wrapped base64": {"image": "\n".join(textwrap.wrap(TEXT, 76)) + "\n"},
    "data URL": {"image": f"data:image/png;base64,{TEXT}"},
    "wrong media type": {"image": f"DATA:image/jpeg;name=x.jpg;BASE64,{TEXT}"},
    "OpenAI's images": {"images": [{"image_url": f"data:image/png;base64,{TEXT}"}]},
    "bare in images": {"images": [{"image_url": TEXT}]},
}


@pytest.fixture(scope="module")
def of_form(http: TestClient) -> list[dict[str, Any]]:
    files = {"image": ("x.png", png(100, 70))}
    answer = http.post(EDITS, data={name: str(value) for name, value in BODY.items()}, files=files)
    return list(answer.json()["data"])


@pytest.mark.parametrize("shape", SHAPES)
def test_it_draws_what_a_form_does(
    http: TestClient, of_form: list[dict[str, Any]], shape: str
) -> None:
    answer = http.post(EDITS, json=BODY | SHAPES[shape])
    assert answer.status_code == 200, answer.text
    assert answer.json()["size"] == "96x72"
    assert answer.json()["data"] == of_form


def test_it_streams_and_gives_raw_images(http: TestClient, of_form: list[dict[str, Any]]) -> None:
    body = BODY | SHAPES["data URL"]
    text = http.post(EDITS, json=body | {"stream": True, "partial_images": 1}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert {event["type"] for event in events} == {
        "image_edit.partial_image",
        "image_edit.completed",
    }
    drawn = {event["seed"]: event["b64_json"] for event in events if "timings" in event}
    assert drawn == {item["seed"]: item["b64_json"] for item in of_form}
    raw = http.post(EDITS, json=body | {"n": 1}, headers={"accept": "image/png"})
    assert raw.content == base64.b64decode(of_form[0]["b64_json"])


def test_a_png_of_max_body_bytes_less_a_quarter_fits(lcm_checkpoint: Path, cache_dir: Path) -> None:
    """Base64 takes a third more, of the bytes that an upload may have as well."""
    upload = png(250, 200)
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    values["max_body_bytes"] = len(upload) * 4 // 3 + 1000
    with TestClient(build_app(Replica(load_settings(values)))) as http:
        fits = {"prompt": "x", "image": base64.b64encode(upload).decode()}
        assert http.post(EDITS, json=fits).status_code == 200
        larger = fits | {"image": base64.b64encode(upload + b" " * 1000).decode()}
        assert http.post(EDITS, json=larger).status_code == 413
