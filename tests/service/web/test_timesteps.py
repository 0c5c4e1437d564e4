"""Timesteps over HTTP: drawn as diffusers draws at them, in both endpoints."""

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
from tests.engines.peers import MIN_PSNR_DB, Peer, psnr_db, recipe

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
BODY = {"prompt": "a red cube", "seed": 3}
NAMED = [999, 749, 499, 249]


@pytest.fixture(scope="module")
def peer(lcm_checkpoint: Path) -> Peer:
    return Peer(lcm_checkpoint, lcm=True)


@pytest.fixture(scope="module")
def http(lcm_checkpoint: Path) -> Iterator[TestClient]:
    values = {"model": str(lcm_checkpoint), "engine": "torch"}
    with TestClient(build_app(Replica(load_settings(values)))) as client:
        yield client


def drawn(answer: Any) -> tuple[dict[str, Any], Image.Image]:
    """What the answer says, and its one picture."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body, Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))


def assert_drawn(peer: Peer, picture: Image.Image, **changes: Any) -> None:
    theirs = peer.draw(recipe(**{"guidance_scale": 8.5} | changes)).pixels
    assert psnr_db(np.asarray(picture), theirs) >= MIN_PSNR_DB


@pytest.mark.parametrize("timesteps", [[800], NAMED, [999.0, 259]])
def test_generations(http: TestClient, peer: Peer, timesteps: list[Any]) -> None:
    body, picture = drawn(http.post(GENERATIONS, json=BODY | {"timesteps": timesteps}))
    assert body["timesteps"] == timesteps
    assert body["num_inference_steps"] == len(timesteps)
    assert_drawn(peer, picture, num_steps=len(timesteps), timesteps=tuple(map(int, timesteps)))
    listed = ", ".join(str(int(timestep)) for timestep in timesteps)
    assert (
        f'Steps: {len(timesteps)}, Timesteps: "{listed}", Sampler: lcm'
        in (picture.info["parameters"])
    )


def test_edits(http: TestClient, peer: Peer) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    fields = BODY | {"strength": 0.5, "num_inference_steps": 4}
    form = {**fields, "timesteps": json.dumps(NAMED)}
    of_form, picture = drawn(http.post(EDITS, data=form, files={"image": buffer.getvalue()}))
    assert of_form["timesteps"] == NAMED
    image = base64.b64encode(buffer.getvalue()).decode()
    of_json, _ = drawn(http.post(EDITS, json=fields | {"timesteps": NAMED, "image": image}))
    assert of_json["data"] == of_form["data"]
    assert_drawn(peer, picture, timesteps=tuple(NAMED), image=pixels, strength=0.5)


def test_without_them_the_sampler_spaces_its_own(http: TestClient, peer: Peer) -> None:
    body, picture = drawn(http.post(GENERATIONS, json=BODY))
    assert body["timesteps"] is None
    assert "Timesteps" not in picture.info["parameters"]
    assert_drawn(peer, picture)


def test_the_document_says_what_they_are(http: TestClient) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    (listed, _) = schemas["GenerationRequest"]["properties"]["timesteps"]["anyOf"]
    assert (listed["minItems"], listed["maxItems"]) == (1, 50)
    assert listed["items"] == {"type": "integer", "minimum": 0, "maximum": 99_999}
    (text, _) = schemas["EditForm"]["properties"]["timesteps"]["anyOf"]
    assert (text["contentMediaType"], text["contentSchema"]) == ("application/json", listed)
