"""Engines that fail: memory, numbers that are none, calls without end. Real ones, broken here."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from engines.backends.engine import Engine, Variant
from engines.drawing.model import load_model
from engines.drawing.runner import Runner
from engines.errors import EngineError
from engines.order import Order
from service.replica import Replica
from service.settings import Settings, load_settings
from service.web.app import build_app
from tests.waiting import wait_for

PATH = "/v1/images/generations"
STEPS = 3


class FaultyEngine:
    """An engine that does what `fault` says before, instead of, or after the real one's work."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.fault: Callable[[Mapping[str, Tensor]], None] = lambda inputs: None
        self.damage: Callable[[dict[str, Tensor]], None] = lambda outputs: None
        self.calls: list[int] = []  # rows of each

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls.append(len(next(iter(inputs.values()))))
        self.fault(inputs)
        outputs = self._engine.run(inputs)
        self.damage(outputs)
        return outputs

    def weight(self, name: str) -> Tensor:
        return self._engine.weight(name)

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._engine.refit(variant, weights)

    def close(self) -> None:
        self._engine.close()

    def heal(self) -> None:
        self.fault, self.damage = (lambda inputs: None), (lambda outputs: None)
        self.calls.clear()


@dataclasses.dataclass
class Service:
    """A service over one faulty denoiser and one faulty decoder."""

    http: TestClient
    replica: Replica
    denoiser: FaultyEngine
    decoder: FaultyEngine

    def draw(self, n: int = 1, seed: int = 1, **headers: str) -> tuple[int, dict[str, object]]:
        body = {"prompt": "a cube", "n": n, "seed": seed, "num_inference_steps": STEPS}
        answer = self.http.post(PATH, json=body, headers=headers)
        return answer.status_code, answer.json()

    def draw_beside_it(self, **arguments: Any) -> tuple[threading.Thread, list[int]]:
        """In a thread of its own; the status when it is there."""
        statuses: list[int] = []
        thread = threading.Thread(target=lambda: statuses.append(self.draw(**arguments)[0]))
        thread.start()
        return thread, statuses


@pytest.fixture(scope="module")
def started(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[Service]:
    order = Order(str(lcm_checkpoint), "onnxruntime", cache_dir=cache_dir, num_threads=1)
    model = load_model(order, lambda *_: None)
    doubles = {name: FaultyEngine(model.engines[name]) for name in ("denoiser", "vae_decoder")}
    model = dataclasses.replace(model, engines={**model.engines, **doubles})

    def open_faulty(settings: Settings) -> Runner:
        return Runner(model, max_batch=4)

    replica = Replica(load_settings({}), open_faulty)
    with TestClient(build_app(replica)) as http:
        yield Service(http, replica, doubles["denoiser"], doubles["vae_decoder"])


@pytest.fixture
def service(started: Service) -> Iterator[Service]:
    yield started
    for engine in (started.denoiser, started.decoder):
        engine.heal()


def _no_memory_beyond(rows: int) -> Callable[[Mapping[str, Tensor]], None]:
    def fault(inputs: Mapping[str, Tensor]) -> None:
        if len(next(iter(inputs.values()))) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    return fault


def _images(body: dict[str, object]) -> object:
    data = body["data"]
    assert isinstance(data, list)
    return [item["b64_json"] for item in data]


def test_without_memory_the_batch_is_halved_and_the_pictures_are_the_same(service: Service) -> None:
    status, healthy = service.draw(n=4)
    assert status == 200
    assert max(service.denoiser.calls) == 4
    service.denoiser.calls.clear()
    service.denoiser.fault = _no_memory_beyond(2)
    status, halved = service.draw(n=4)
    assert status == 200
    assert _images(halved) == _images(healthy), "a second attempt draws no other noise"
    assert service.denoiser.calls.count(2) >= 2 * STEPS


def test_without_any_memory_it_sheds_and_goes_on(service: Service) -> None:
    for engine in (service.denoiser, service.decoder):
        engine.fault = _no_memory_beyond(0)
        status, body = service.draw(n=2)
        assert status == 503
        error = body["error"]
        assert isinstance(error, dict)
        assert error["code"] == "out_of_memory"
        assert "smaller size" in error["message"]
        engine.heal()
        assert service.draw()[0] == 200


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_fails_alone(service: Service, value: float) -> None:
    _, expected = service.draw(seed=5)
    service.denoiser.calls.clear()
    both = threading.Event()

    def wait_for_both(inputs: Mapping[str, Tensor]) -> None:
        both.wait(600)

    def damage(outputs: dict[str, Tensor]) -> None:
        if len(outputs["next_sample"]) == 2:
            broken = outputs["next_sample"].clone()
            broken[0] = value  # the first to come has fewest steps left, so it stands first
            outputs["next_sample"] = broken

    service.denoiser.fault, service.denoiser.damage = wait_for_both, damage
    first, first_status = service.draw_beside_it(seed=4)
    wait_for(lambda: bool(service.denoiser.calls), "the first is drawn")
    answers: list[tuple[int, dict[str, object]]] = []
    second = threading.Thread(target=lambda: answers.append(service.draw(seed=5)))
    second.start()
    wait_for(lambda: len(service.replica.loop._ledger.open) == 2, "the second has come")
    both.set()
    first.join()
    second.join()
    assert first_status == [500]
    assert answers[0][0] == 200
    assert _images(answers[0][1]) == _images(expected)


def test_the_error_says_what_would_help(service: Service) -> None:
    service.denoiser.damage = lambda outputs: outputs.update(
        next_sample=torch.full_like(outputs["next_sample"], torch.nan)
    )
    status, body = service.draw()
    assert status == 500
    error = body["error"]
    assert isinstance(error, dict)
    assert error["code"] == "not_finite"
    assert "bf16 or fp32" in error["message"]
    runner = service.replica.runner
    with pytest.raises(EngineError, match="not all finite"):
        runner.draw([runner.default_recipe(0)])


def test_a_decoder_that_overflows_is_no_black_picture(service: Service) -> None:
    _, expected = service.draw(n=2)
    service.decoder.damage = lambda outputs: outputs.update(
        pixels=torch.zeros_like(outputs["pixels"]),
        pixel_sums=torch.full_like(outputs["pixel_sums"], torch.inf),
    )
    status, body = service.draw()
    assert status == 500
    error = body["error"]
    assert isinstance(error, dict)
    assert error["code"] == "not_finite"
    assert "the decoder overflowed in fp32" in error["message"]
    assert "bf16 or fp32" in error["message"]
    service.decoder.damage = lambda outputs: outputs.__delitem__("pixel_sums")  # an older bundle
    status, drawn = service.draw(n=2)
    assert status == 200
    assert _images(drawn) == _images(expected)


def test_a_wedged_engine_turns_health_red_and_leaves_nobody_waiting(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.replica.loop, "_max_call_s", 0.3)
    release = threading.Event()
    service.denoiser.fault = lambda inputs: release.wait(600) and None
    waiting, statuses = service.draw_beside_it(**{"X-Request-Timeout": "5"})
    try:
        wait_for(lambda: not service.replica.ready, "its call takes too long")
        assert service.http.get("/readyz").status_code == 503
        assert service.http.get("/healthz").status_code == 200
        assert service.draw()[0] == 503, "nothing more is accepted"
        waiting.join()
        assert statuses == [504]
        assert not service.replica.ready, "the handler itself gave up, not the call"
    finally:
        release.set()
    service.denoiser.heal()
    wait_for(lambda: service.replica.ready, "the call has ended")
    status, body = service.draw()
    assert status == 200
    assert np.size(_images(body)) == 1
