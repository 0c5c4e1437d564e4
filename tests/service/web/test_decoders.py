"""A tiny decoder over HTTP: asked for in both endpoints, recorded, used for previews."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from engines.drawing.runner import Runner
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from tests.engines.checkpoints import make_tiny_vae
from tests.service.web.test_api import png

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
BODY = {"prompt": "a red cube", "seed": 3, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def replica(lcm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Replica:
    tiny_vae = make_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny-vae")
    values = {
        "model": str(lcm_checkpoint), "engine": "torch", "tiny_vae": str(tiny_vae),
        "default_decoder": "tiny", "image_cache_bytes": 2**20,
    }  # fmt: skip
    return Replica(load_settings(values))


@pytest.fixture(scope="module")
def http(replica: Replica) -> Iterator[TestClient]:
    with TestClient(build_app(replica)) as client:
        yield client


def picture(answer: Any) -> tuple[str, Image.Image]:
    """By what it was decoded, and the picture."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["decoder"], Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))


def drawn(runner: Runner, decoder: str) -> np.ndarray:
    """What the engine draws of the body by itself."""
    recipe = dataclasses.replace(runner.default_recipe(3, "a red cube", 2), decoder=decoder)
    pixels = runner.draw([recipe])[0].pixels
    assert pixels is not None
    return pixels


def decodes(http: TestClient, decoder: str) -> float:
    """Calls so far."""
    start = f'fourstep_decode_seconds_count{{decoder="{decoder}"'
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def test_the_model_says_what_it_has(http: TestClient) -> None:
    details = http.get("/v1/models").json()["data"][0]["details"]
    assert details["decoders"] == ["full", "tiny"]
    assert details["default_decoder"] == "tiny"
    assert details["components"] == {"tiny_vae": "tiny-vae"}


def test_each_draws_and_is_recorded(http: TestClient, replica: Replica) -> None:
    """Without the field the default; other pictures, so no other's from the cache."""
    pictures = {}
    for decoder in ("full", "tiny"):
        name, pictures[decoder] = picture(http.post(GENERATIONS, json=BODY | {"decoder": decoder}))
        assert name == decoder
        assert np.array_equal(np.asarray(pictures[decoder]), drawn(replica.runner, decoder))
    assert "Decoder: tiny" in pictures["tiny"].info["parameters"]
    assert "Decoder" not in pictures["full"].info["parameters"]
    answer = http.post(GENERATIONS, json=BODY)
    assert answer.json()["data"][0]["cached"] is True
    assert picture(answer) == ("tiny", pictures["tiny"])


def test_edits_as_forms_and_as_json(http: TestClient) -> None:
    upload = png(64, 64)
    for decoder in ("full", "tiny"):
        form = {name: str(value) for name, value in BODY.items()} | {"decoder": decoder}
        of_form = picture(http.post(EDITS, data=form, files={"image": ("x.png", upload)}))
        image = base64.b64encode(upload).decode()
        of_json = picture(http.post(EDITS, json=BODY | {"image": image, "decoder": decoder}))
        assert of_form == of_json
        assert of_form[0] == decoder


def test_previews_are_by_the_tiny_one(http: TestClient) -> None:
    before = [decodes(http, decoder) for decoder in ("full", "tiny")]
    body = BODY | {"stream": True, "partial_images": 1, "decoder": "full", "seed": 4}
    text = http.post(GENERATIONS, json=body).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image", "completed"]
    assert [decodes(http, decoder) for decoder in ("full", "tiny")] == [n + 1 for n in before]


def test_large_images_in_tiles(lcm_checkpoint: Path, http: TestClient, replica: Replica) -> None:
    """The same picture as the engine's own, another than a whole decode's."""
    values = {"model": str(lcm_checkpoint), "engine": "torch", "vae_tiling_px": 64}
    tiled = Replica(load_settings(values))
    body = BODY | {"size": "128x128"}
    with TestClient(build_app(tiled)) as other:
        before = decodes(other, "full")
        _, found = picture(other.post(GENERATIONS, json=body))
        assert decodes(other, "full") == before + 9
        recipe = dataclasses.replace(
            tiled.runner.default_recipe(3, "a red cube", 2), width_px=128, height_px=128
        )
        of_tiles = tiled.runner.draw([recipe])[0].pixels
    whole = replica.runner.draw([dataclasses.replace(recipe, decoder="full")])[0].pixels
    assert of_tiles is not None
    assert np.array_equal(np.asarray(found), of_tiles)
    assert whole is not None
    assert not np.array_equal(whole, of_tiles)
