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

from engines.errors import InvalidInput
from service.replica import Replica
from service.settings import SettingsError, load_settings
from service.web.app import build_app
from tests.engines.checkpoints import make_lora
from tests.engines.peers import MIN_PSNR_DB, Peer, psnr_db, recipe

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
BODY = {"prompt": "a red cube", "seed": 3}
NAMED = [999, 749, 499, 249]


@pytest.fixture(scope="module")
def peer(lcm_checkpoint: Path) -> Peer:
    return Peer(lcm_checkpoint)


@pytest.fixture(scope="module")
def http(lcm_checkpoint: Path) -> Iterator[TestClient]:
    values = {"model": str(lcm_checkpoint), "engine": "torch"}
    with TestClient(build_app(Replica(load_settings(values)))) as client:
        yield client


@pytest.fixture(scope="module")
def pinned(lcm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service that pins them, with a LoRA that a request may name."""
    lora = make_lora(lcm_checkpoint, tmp_path_factory.mktemp("loras") / "ink", ["to_q"])
    values = {"model": str(lcm_checkpoint), "engine": "torch", "loras": {"ink": lora}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOURSTEP_DEFAULT_TIMESTEPS", "[999, 749, 399]")
        patch.setenv("FOURSTEP_DEFAULT_GUIDANCE", "0")
        settings = load_settings(values)
    with TestClient(build_app(Replica(settings))) as client:
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


def test_pinned_ones_are_told_and_drawn_at(pinned: TestClient, peer: Peer) -> None:
    details = pinned.get("/v1/models").json()["data"][0]["details"]
    assert details["default_timesteps"] == [999, 749, 399]
    assert details["default_num_inference_steps"] == 3
    assert (details["default_sampler"], details["default_guidance_scale"]) == ("lcm", 0.0)
    body, picture = drawn(pinned.post(GENERATIONS, json=BODY))
    assert (body["timesteps"], body["num_inference_steps"]) == ([999, 749, 399], 3)
    assert_drawn(peer, picture, num_steps=3, timesteps=(999, 749, 399), guidance_scale=0.0)


@pytest.mark.parametrize(
    ("fields", "timesteps"),
    [
        ({"num_inference_steps": 3, "sampler": "lcm"}, [999, 749, 399]),
        ({"quality": "medium", "guidance_scale": 2.0}, [999, 749, 399]),
        ({"loras": [{"name": "ink"}]}, [999, 749, 399]),
        ({"num_inference_steps": 4}, None),
        ({"quality": "low"}, None),
        ({"sampler": "tcd"}, None),
        ({"sampler": "ddim"}, None),
        ({"timesteps": [800]}, [800]),
    ],
)
def test_pinned_ones_are_for_their_sampler_and_number_of_steps(
    pinned: TestClient, fields: dict[str, Any], timesteps: list[int] | None
) -> None:
    assert drawn(pinned.post(GENERATIONS, json=BODY | fields))[0]["timesteps"] == timesteps


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"default_timesteps": [400, 800]}, "each must be below the one before it"),
        ({"default_timesteps": [800], "default_steps": 2}, "num_inference_steps is 2"),
        ({"default_timesteps": [800], "default_sampler": "ddim"}, "ddim takes none"),
    ],
)
def test_a_service_does_not_start_with_pins_that_cannot_be_drawn(
    lcm_checkpoint: Path, defaults: dict[str, Any], message: str
) -> None:
    values = {"model": str(lcm_checkpoint), "engine": "torch"} | defaults
    with (
        pytest.raises(InvalidInput, match=message),
        TestClient(build_app(Replica(load_settings(values)))),
    ):
        pass


def test_no_timesteps_are_no_pin() -> None:
    with pytest.raises(SettingsError, match="default_timesteps"):
        load_settings({"default_timesteps": []})
