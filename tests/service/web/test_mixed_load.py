"""SDXL rows of all kinds through the whole service at once: each picture is the one drawn alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from tests.engines.checkpoints import make_xl_checkpoint
from tests.engines.peers import psnr_db

MIXED: list[dict[str, Any]] = [
    {
        "prompt": "a red cube",
        "seed": num_steps,
        "num_inference_steps": num_steps,
        "size": size,
        "guidance_scale": guidance,
        "sampler": sampler,
    }
    for num_steps in range(1, 9)
    for size, guidance, sampler in (("64x64", 0.0, "euler"), ("64x96", 5.0, "lcm"))
] + [
    {"prompt": "a blue ball", "seed": 40, "size": "64x96", "negative_prompt": "dark",
     "guidance_scale": 3.0, "original_size": "768x512"},
    {"prompt": "a blue ball", "seed": 41, "size": "64x64", "guidance_scale": 7.0},
]  # fmt: skip


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    checkpoint = make_xl_checkpoint(tmp_path_factory.mktemp("xl") / "tiny-xl")
    values = {"model": str(checkpoint), "engine": "torch", "max_batch": 8, "num_threads": 1}
    with TestClient(build_app(Replica(load_settings(values)))) as client:
        yield client


def draw(http: TestClient, body: dict[str, Any]) -> np.ndarray:
    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    )


def num_denoise_calls(http: TestClient) -> float:
    lines = http.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("fourstep_denoise_step_seconds_count")]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def test_each_picture_is_the_one_drawn_alone(http: TestClient) -> None:
    begun = num_denoise_calls(http)
    alone = [draw(http, body) for body in MIXED]
    between = num_denoise_calls(http)
    with ThreadPoolExecutor(len(MIXED)) as pool:
        together = list(pool.map(lambda body: draw(http, body), MIXED))
    assert num_denoise_calls(http) - between < between - begun  # some did share calls
    for body, ours, others in zip(MIXED, together, alone, strict=True):
        assert ours.shape == others.shape, body
        assert np.abs(ours.astype(int) - others).max() <= 1, body  # a rounding, of sums in batches
    for k in range(1, len(MIXED)):  # and not because all are alike
        assert alone[k].shape != alone[k - 1].shape or psnr_db(alone[k], alone[k - 1]) < 60
