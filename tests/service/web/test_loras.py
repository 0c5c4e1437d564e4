"""LoRAs over HTTP: allowed by name, weighted per request, or the service's default."""

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
from safetensors.torch import load_file, save_file

from service.replica import Replica
from service.settings import SettingsError, load_settings
from service.web.app import build_app
from tests.engines.checkpoints import as_kohya, make_lora
from tests.service.web.live.test_session import PATH, hear, pixels_of, say
from tests.service.web.test_api import png

STRIPED = Path("engines/demo/demo-striped-lora")
BODY = {"prompt": "a red star", "seed": 5, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def loras(lcm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    targets = {"ink": ["to_q", "to_v"], "glow": ["conv1", "to_k", "to_v"]}
    return {name: make_lora(lcm_checkpoint, folder / name, of) for name, of in targets.items()}


@pytest.fixture(scope="module")
def http(lcm_checkpoint: Path, cache_dir: Path, loras: dict[str, Path]) -> Iterator[TestClient]:
    settings = load_settings(
        {
            "model": str(lcm_checkpoint),
            "engine": "onnxruntime",
            "cache_dir": cache_dir,
            "loras": loras,
            "default_loras": {"ink": 1.0},
        }
    )
    with TestClient(build_app(Replica(settings))) as client:
        yield client


def draw(http: TestClient, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/images/generations", json=BODY | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_request_chooses_by_name_and_weight(http: TestClient) -> None:
    default = draw(http)
    assert default["loras"] == {"ink": 1.0}
    ink = draw(http, loras=[{"name": "ink"}])
    assert ink["data"] == default["data"]
    base = draw(http, loras=[])
    assert base["loras"] == {}
    both = draw(http, loras=[{"name": "glow", "weight": 0.5}, {"name": "ink", "weight": 0.8}])
    turned = draw(http, loras=[{"name": "ink", "weight": 0.8}, {"name": "glow", "weight": 0.5}])
    assert both["data"] == turned["data"]
    pictures = {answer["data"][0]["b64_json"] for answer in (default, base, both)}
    assert len(pictures) == 3
    assert draw(http, loras=[])["data"] == base["data"]
    assert draw(http, loras=[{"name": "ink", "weight": 0}])["data"] == base["data"]


def test_a_live_session_draws_with_them_and_changes_them(http: TestClient) -> None:
    """Each frame is the picture that the images API gives: chosen, changed, by a frame, removed."""
    both = [{"name": "glow", "weight": 0.5}, {"name": "ink", "weight": 0.8}]
    told: list[dict[str, Any]] = [{}, {"loras": [{"name": "glow"}]}, {"loras": both}, {"loras": []}]
    with http.websocket_connect(PATH) as session:
        for number, update in enumerate(told):
            say(session, "session.update", **BODY, **update, output_format="png")
            hear(session)
            say(session, "frame", id=number)
            assert np.array_equal(pixels_of(hear(session)), drawn_pixels(http, **update)), update
        say(session, "frame", id=9, loras=[{"name": "ink"}])
        assert np.array_equal(pixels_of(hear(session)), drawn_pixels(http))
        say(session, "frame", id=10)
        assert np.array_equal(pixels_of(hear(session)), drawn_pixels(http, loras=[]))
        say(session, "session.update", loras=[{"name": "oil"}])
        hear(session)  # which LoRAs there are, a frame finds out
        say(session, "frame", id=11)
        assert "loras names 'oil'" in hear(session)["error"]["message"]


def drawn_pixels(http: TestClient, **fields: Any) -> np.ndarray:
    (answer,) = draw(http, **fields)["data"]
    with Image.open(io.BytesIO(base64.b64decode(answer["b64_json"]))) as image:
        return np.asarray(image)


def test_an_edit_carries_them_as_json(http: TestClient) -> None:
    form = {k: str(v) for k, v in BODY.items()}
    form["loras"] = json.dumps([{"name": "glow", "weight": 1.0}])
    answer = http.post("/v1/images/edits", data=form, files={"image": png()})
    assert answer.status_code == 200, answer.text
    assert answer.json()["loras"] == {"glow": 1.0}
    answer = http.post("/v1/images/edits", data=form | {"loras": "glow"}, files={"image": png()})
    assert answer.status_code == 400
    assert "write it as JSON" in answer.json()["error"]["message"]


def test_they_are_listed_and_written_into_the_picture(http: TestClient) -> None:
    details = http.get("/v1/models").json()["data"][0]["details"]
    assert details["loras"] == ["ink", "glow"]
    assert details["default_loras"] == {"ink": 1.0}
    answer = http.post("/v1/images/generations", json=BODY, headers={"accept": "image/png"})
    assert b'LoRAs: "ink: 1"' in answer.content


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ([{"name": "oil"}], "loras names 'oil'; served with this model: ink, glow"),
        ([{"name": "ink"}, {"name": "ink"}], "loras names 'ink' twice; give it one weight"),
        ([{"name": "ink", "weight": 5}], "loras.0.weight is 5: input should be less than or"),
        ([{"name": "ink", "strength": 1}], "unknown field 'loras.0.strength'"),
        ("ink", 'loras is "ink": input should be a valid array'),
        ([{"name": "ink"}] * 9, "list should have at most 8 items"),
    ],
)
def test_wrong_choices(http: TestClient, choice: Any, message: str) -> None:
    answer = http.post("/v1/images/generations", json=BODY | {"loras": choice})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"].startswith("loras")


@pytest.fixture(scope="module")
def shipped(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The demo model with its stripes, as they are shipped and as kohya would have written them."""
    folder = tmp_path_factory.mktemp("kohya")
    file, kohya = STRIPED / "pytorch_lora_weights.safetensors", folder / "kohya.safetensors"
    save_file(as_kohya(load_file(file), 4.0), kohya)
    values = {"model": "demo-base", "engine": "torch", "device": "cpu", "cache_dir": cache_dir}
    loras = {"shipped": STRIPED, "kohya": kohya}
    with TestClient(build_app(Replica(load_settings(values | {"loras": loras})))) as client:
        yield client


def test_a_kohya_file_with_small_alphas_draws_the_same_picture(shipped: TestClient) -> None:
    """Four times the `up`, a quarter of the rank for α: the same sums, to the last bit."""
    pictures = []
    for names in (["kohya"], ["shipped"], []):
        loras = [{"name": name} for name in names]
        pictures.append(drawn_pixels(shipped, loras=loras).tobytes())
    kohya, original, bare = pictures
    assert kohya == original
    assert kohya != bare


def test_a_default_that_is_not_served(loras: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match="default_loras names 'oil', loras has ink, glow"):
        load_settings({"loras": loras, "default_loras": {"oil": 1.0}})
