"""SDXL's size conditioning over HTTP, against diffusers' pipelines given the same arguments."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from tests.engines.checkpoints import make_xl_checkpoint
from tests.engines.peers import MIN_PSNR_DB, Peer, psnr_db, recipe

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
BODY: dict[str, Any] = {
    "prompt": "a red cube", "seed": 3, "num_inference_steps": 3, "guidance_scale": 4.0,
    "sampler": "euler",
}  # fmt: skip
# As the API has them → as diffusers has them.
TOLD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"original_size": "768x512"}, {"original_size": (512, 768)}),
    ({"crops_coords_top_left": [8, 160]}, {"crops_coords_top_left": (8, 160)}),
    ({"target_size": "80x960"}, {"target_size": (960, 80)}),
    (
        {"original_size": "4096x1", "crops_coords_top_left": [0, 99_999], "target_size": "64x72"},
        {
            "original_size": (1, 4096),
            "crops_coords_top_left": (0, 99_999),
            "target_size": (72, 64),
        },
    ),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_xl_checkpoint(tmp_path_factory.mktemp("xl") / "tiny-xl")


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> Peer:
    return Peer(checkpoint)


@pytest.fixture(scope="module")
def http(checkpoint: Path) -> Iterator[TestClient]:
    values = {"model": str(checkpoint), "engine": "torch", "image_cache_bytes": 2**20}
    with TestClient(build_app(Replica(load_settings(values)))) as client:
        yield client


def drawn(answer: Any) -> tuple[dict[str, Any], Image.Image]:
    """The one item of an answer, and its picture."""
    assert answer.status_code == 200, answer.text
    (item,) = answer.json()["data"]
    return item, Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def assert_drawn(peer: Peer, picture: Image.Image, **changes: Any) -> None:
    wanted = recipe(num_steps=3, guidance_scale=4.0, sampler="euler", **changes)
    assert psnr_db(np.asarray(picture), peer.draw(wanted).pixels) >= MIN_PSNR_DB


@pytest.mark.parametrize(("fields", "arguments"), TOLD)
def test_generations(
    http: TestClient, peer: Peer, fields: dict[str, Any], arguments: dict[str, Any]
) -> None:
    _, plain = drawn(http.post(GENERATIONS, json=BODY))
    item, picture = drawn(http.post(GENERATIONS, json=BODY | fields))
    assert "cached" not in item  # though only these fields are others
    assert not np.array_equal(np.asarray(plain), np.asarray(picture))
    assert_drawn(peer, picture, **arguments)
    again, _ = drawn(http.post(GENERATIONS, json=BODY | fields))
    assert (again.pop("cached"), again) == (True, item)


@pytest.mark.parametrize(("fields", "arguments"), TOLD)
def test_edits(
    http: TestClient, peer: Peer, fields: dict[str, Any], arguments: dict[str, Any]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    body = BODY | {"strength": 0.7} | fields
    image = base64.b64encode(buffer.getvalue()).decode()
    of_json, picture = drawn(http.post(EDITS, json=body | {"image": image}))
    assert_drawn(peer, picture, image=pixels, strength=0.7, **arguments)
    form = {
        name: json.dumps(value) if isinstance(value, list) else value
        for name, value in body.items()
    }
    of_form, _ = drawn(http.post(EDITS, data=form, files={"image": buffer.getvalue()}))
    assert of_form["b64_json"] == of_json["b64_json"]


def test_files_say_what_was_told(http: TestClient) -> None:
    fields = {"original_size": "768x512", "crops_coords_top_left": [8, 160], "target_size": "9x8"}
    _, picture = drawn(http.post(GENERATIONS, json=BODY | fields))
    assert (
        'Size: 64x64, Original size: 768x512, Crops coords top left: "8, 160", Target size: 9x8'
        in picture.info["parameters"]
    )
    _, plain = drawn(http.post(GENERATIONS, json=BODY))
    assert "Original size" not in plain.info["parameters"]


def test_models_say_whether_they_take_it(http: TestClient) -> None:
    assert http.get("/v1/models").json()["data"][0]["details"]["size_conditioning"] is True
