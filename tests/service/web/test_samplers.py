"""Samplers by name: what a model takes, what draws when none is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from fastapi.testclient import TestClient

from engines.samplers import SAMPLERS
from service.replica import Replica
from service.settings import SamplerName, load_settings
from service.web.app import build_app
from tests.engines.checkpoints import SCHEDULE, make_checkpoint, with_scheduler

URL = "/v1/images/generations"
BODY = {"prompt": "x", "num_inference_steps": 2}
SAID = "the checkpoint names UniPCMultistepScheduler; the sampler dpmpp_2m stands in"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A model whose scheduler class is none of ours, and one of whose options is no table's."""
    folder = tmp_path_factory.mktemp("models")
    config = SCHEDULE | {"_class_name": "UniPCMultistepScheduler", "interpolation_type": "cubic"}
    model = with_scheduler(config, make_checkpoint(folder / "sd", lcm=False), folder / "unipc")
    settings = load_settings({"model": str(model), "engine": "torch"})
    with TestClient(build_app(Replica(settings))) as client:
        yield client


def test_a_stand_in_is_named(http: TestClient) -> None:
    details = http.get("/v1/models").json()["data"][0]["details"]
    assert details["scheduler"] == "UniPCMultistepScheduler"
    assert details["default_sampler"] == "dpmpp_2m"
    assert details["default_sampler_stands_in"] is True
    answer = http.post(URL, json=BODY).json()
    assert answer["sampler"] == "dpmpp_2m"
    assert answer["warnings"] == [SAID]


def test_a_sampler_that_was_asked_for_stands_in_for_nothing(http: TestClient) -> None:
    answer = http.post(URL, json=BODY | {"sampler": "dpmpp_2m"}).json()
    assert answer["warnings"] == []


def test_a_sampler_without_the_checkpoints_option_is_refused_by_name(http: TestClient) -> None:
    details = http.get("/v1/models").json()["data"][0]["details"]
    assert details["samplers"] == [name for name in SAMPLERS if name != "euler"]
    answer = http.post(URL, json=BODY | {"sampler": "euler"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "sampler"
    assert error["message"] == (
        "sampler is 'euler', which does not support the checkpoint's scheduler option "
        "interpolation_type='cubic'; use lcm, ddim, euler_ancestral, tcd, dpmpp_2m, dpmpp_2m_sde"
    )


def test_the_schema_has_every_sampler() -> None:
    assert get_args(SamplerName) == SAMPLERS
