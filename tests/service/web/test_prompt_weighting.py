"""Weights in a request's prompts: off unless it asks, and refused with the field that has them."""

from __future__ import annotations

import base64
import io
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
from tests.engines.checkpoints import make_checkpoint
from tests.engines.compel import Words, encode
from tests.engines.peers import Peer, psnr_db, recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("weights") / "tiny-sd", lcm=False)


@pytest.fixture(scope="module")
def http(checkpoint: Path) -> Iterator[TestClient]:
    settings = load_settings({"model": str(checkpoint), "engine": "torch"})
    with TestClient(build_app(Replica(settings))) as client:
        yield client


def _ask(http: TestClient, prompt: str, **changes: Any) -> Any:
    body = {"prompt": prompt, "num_inference_steps": 2, "seed": 3, "sampler": "euler",
            "guidance_scale": 4.0, **changes}  # fmt: skip
    return http.post("/v1/images/generations", json=body)


def _pixels(answer: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))


def test_pictures_are_those_of_compel(http: TestClient, checkpoint: Path) -> None:
    prompt = Words("a (cube:1.4)", [("a ", 1.0), ("cube", 1.4)])
    negative = Words("[red] ball", [("red", 1 / 1.1), (" ball", 1.0)])
    wanted = recipe(
        prompt=prompt, negative_prompt=negative, num_steps=2, sampler="euler", guidance_scale=4.0
    )
    weighted = _pixels(_ask(http, prompt, negative_prompt=negative, prompt_weighting=True))
    assert psnr_db(weighted, Peer(checkpoint, encode=encode).draw(wanted).pixels) >= 50
    plain = _pixels(_ask(http, prompt, negative_prompt=negative))
    assert psnr_db(plain, Peer(checkpoint).draw(wanted).pixels) >= 50
    assert (weighted != plain).any()


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_too_much_is_refused_by_its_field(http: TestClient, field: str) -> None:
    answer = _ask(http, **{"prompt": "a", field: "a (cube:11)", "prompt_weighting": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert answer.json()["error"]["message"] == (
        f"{field} gives 'cube' the weight 11; it must be from -10 to 10, brackets within brackets "
        "included"
    )
