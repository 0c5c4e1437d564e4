"""Prompts longer than the text encoder's window: said, refused or drawn, for both of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from tests.engines.checkpoints import make_checkpoint

LONG = "x" * 40
LONGER = "x" * 45


@pytest.fixture(params=["truncate", "refuse", "chunk"])
def http(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, TestClient]]:
    """A model that takes negative prompts."""
    model = make_checkpoint(tmp_path / "tiny-sd", lcm=False)
    values = {"model": str(model), "engine": "torch", "long_prompt": request.param}
    settings = load_settings(values)
    with TestClient(build_app(Replica(settings))) as client:
        yield request.param, client


def _ask(http: TestClient, **changes: Any) -> tuple[int, Any]:
    body = {"prompt": "x", "num_inference_steps": 1, "guidance_scale": 4.0, **changes}
    answer = http.post("/v1/images/generations", json=body)
    return answer.status_code, answer.json()


def test_what_does_not_fit_is_said_of_the_prompt_that_it_is(http: tuple[str, TestClient]) -> None:
    setting, client = http
    for name in ("prompt", "negative_prompt"):
        status, body = _ask(client, **{name: LONG})
        said = f"{name} is 26 tokens longer than the text encoder's window of 16"
        if setting == "chunk":
            assert (status, body["warnings"]) == (200, [])
            status, body = _ask(client, **{name: LONGER})
            room = "3 of the text encoder's windows of 16"
            message = f"{name} is 3 tokens longer than {room}; the end was left out"
            assert (status, body["warnings"]) == (200, [message])
        elif setting == "truncate":
            assert status == 200
            assert body["warnings"] == [f"{said}; the end was left out"]
        else:
            assert status == 400
            assert body["error"]["message"] == f"{said}; shorten it"
            assert (body["error"]["param"], body["error"]["code"]) == (name, "prompt_too_long")
    status, body = _ask(client, negative_prompt=LONG, guidance_scale=1.0)  # has no effect at all
    assert status == 200
    assert body["warnings"] == ["negative_prompt has no effect: this model needs guidance above 1"]
