"""Warm-up reaches every part at every batch size that serving may ask of it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.backends.engine import Engine, Variant
from engines.drawing.model import Model, load_model
from engines.drawing.runner import Runner
from engines.errors import EngineError
from engines.order import Order
from tests.engines.peers import recipe


class _Counted:
    """An engine that notes the rows of its calls."""

    def __init__(self, engine: Engine, sizes: list[int]) -> None:
        self._engine, self._sizes = engine, sizes

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._sizes.append(len(next(iter(inputs.values()))))
        return self._engine.run(inputs)

    def weight(self, name: str) -> Tensor:
        return self._engine.weight(name)

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._engine.refit(variant, weights)

    def close(self) -> None:
        self._engine.close()


@pytest.fixture(params=["tiny-lcm", "tiny-sd"])
def counted(
    request: pytest.FixtureRequest, checkpoints: Path
) -> tuple[Model, dict[str, list[int]]]:
    """A model, and by part the rows of each call so far."""
    sizes: dict[str, list[int]] = defaultdict(list)
    model = load_model(Order(str(checkpoints / request.param), "torch"), lambda *_: None)
    engines = {name: _Counted(engine, sizes[name]) for name, engine in model.engines.items()}
    return dataclasses.replace(model, engines=engines), sizes


def test_a_cpu_is_warmed_at_the_smallest_and_the_largest(
    counted: tuple[Model, dict[str, list[int]]],
) -> None:
    model, sizes = counted
    runner = Runner(model, max_batch=6)
    runner.warm_up()
    assert {*sizes["text_encoder"]} == {*sizes["denoiser"]} == {6, 2, 1}
    assert {*sizes["vae_encoder"]} == {*sizes["vae_decoder"]} == {2, 1}


def test_a_gpu_is_warmed_at_every_size(
    counted: tuple[Model, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is only said to be one."""
    model, sizes = counted
    monkeypatch.setattr(Runner, "device", "cuda")
    runner = Runner(model, max_batch=5)
    runner.info = dataclasses.replace(runner.info, max_decode_batch=4)
    runner.warm_up()
    assert {*sizes["text_encoder"]} == {*sizes["denoiser"]} == {1, 2, 3, 4, 5}
    # The largest first, and each once more, to be captured.
    assert sizes["vae_encoder"] == sizes["vae_decoder"] == [4, 4, 3, 3, 2, 2, 1, 1]


def test_no_call_has_more_texts_than_lanes(counted: tuple[Model, dict[str, list[int]]]) -> None:
    """Guided rows have two each, and plans are built for a batch."""
    model, sizes = counted
    runner = Runner(model, max_batch=4)
    wanted = [
        recipe(prompt=f"a {k}", negative_prompt=f"no {k}", guidance_scale=5.0) for k in range(4)
    ]
    rows = [runner.start(each) for each in wanted]
    runner.encode_text(rows)
    assert max(sizes["text_encoder"]) == 4
    assert all(row.text_encoded for row in rows)


def test_what_draws_no_picture_is_not_warm(
    counted: tuple[Model, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = counted
    engine = model.engines["denoiser"]
    run = engine.run

    def overflow(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.full_like(value, torch.inf) for name, value in run(inputs).items()}

    monkeypatch.setattr(engine, "run", overflow)
    with pytest.raises(EngineError, match="not all finite"):
        Runner(model, max_batch=2).warm_up()
