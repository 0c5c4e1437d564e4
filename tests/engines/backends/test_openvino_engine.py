"""OpenVINO draws what diffusers draws, at shapes that change, with LoRA sets that come and go."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.backends import openvino_engine
from engines.drawing.model import load_model
from engines.drawing.parity import compare
from engines.drawing.runner import Runner
from engines.errors import BackendUnavailable
from engines.families.recipe import Recipe
from engines.order import Order
from tests.engines.checkpoints import make_lora, make_pixart_checkpoint, make_xl_checkpoint
from tests.engines.peers import Peer, assert_agree, draw_together, recipe

LORAS = ("one", "two")


def _image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)


WANTED = [
    recipe(seed=1, num_steps=3, sampler="ddim", guidance_scale=5.0, negative_prompt="dark"),
    recipe(seed=2, num_steps=2, sampler="lcm", guidance_scale=1.0, prompt="two cats"),
    recipe(seed=3, num_steps=4, sampler="lcm", image=_image(3), strength=0.6),
]
WIDE = [recipe(seed=4, num_steps=1, guidance_scale=1.0, width_px=128, height_px=64)]


@pytest.fixture(scope="module")
def loras(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("loras"), checkpoints / "tiny-sd"
    targets = (["to_q", "conv1"], ["to_k", "to_out.0"])
    return {
        name: make_lora(model, folder / name, each, text_encoder=True)
        for name, each in zip(LORAS, targets, strict=True)
    }


@pytest.fixture(scope="module")
def runner(checkpoints: Path, cache_dir: Path, loras: dict[str, Path]) -> Iterator[Runner]:
    runner = Runner.open(
        Order(
            str(checkpoints / "tiny-sd"), "openvino", cache_dir=cache_dir, num_threads=1,
            loras={name: str(path) for name, path in loras.items()},
        )
    )  # fmt: skip
    assert (runner.info.backend, runner.info.max_calls) == ("openvino", 1)
    yield runner
    runner.close()


@pytest.mark.parametrize("wanted", [WANTED, WIDE, WANTED[:1]], ids=["mixed", "wide", "alone"])
def test_pictures_are_those_of_diffusers(
    wanted: list[Recipe], runner: Runner, checkpoints: Path
) -> None:
    peer = Peer(checkpoints / "tiny-sd")
    for ours, each in zip(draw_together(runner, wanted), wanted, strict=True):
        assert_agree(ours, peer.draw(each), each)


def test_lora_sets_come_and_go(
    runner: Runner, checkpoints: Path, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no more than one is kept, too."""
    peer = Peer(checkpoints / "tiny-sd", loras=loras)
    sets: list[dict[str, float]] = [{"one": 0.8}, {}, {"one": 0.8, "two": -0.5}, {"one": 0.8}, {}]
    for most in (1, 4):
        for engine in runner._model.engines.values():
            assert isinstance(engine, openvino_engine.OpenVinoEngine)
            monkeypatch.setattr(engine._variants, "_most", most)
        for index, chosen in enumerate(sets):
            wanted = recipe(seed=index, num_steps=2, guidance_scale=3.0, loras=chosen)
            (ours,) = draw_together(runner, [wanted])
            assert_agree(ours, peer.draw(wanted), wanted)
            held = len(runner._model.engines["denoiser"]._variants)  # type: ignore[attr-defined]
            assert held <= most


@pytest.fixture(scope="module", params=["xl", "pixart", "clips"])
def checkpoint(request: pytest.FixtureRequest, tiny_clips: Path, tmp_path_factory: Any) -> Path:
    make = {"xl": make_xl_checkpoint, "pixart": make_pixart_checkpoint}.get(request.param)
    return make(tmp_path_factory.mktemp("checkpoint") / request.param) if make else tiny_clips


def test_every_family_is_what_onnxruntime_draws(checkpoint: Path, cache_dir: Path) -> None:
    models = [
        load_model(Order(str(checkpoint), backend, cache_dir=cache_dir, num_threads=1), print)
        for backend in ("onnxruntime", "openvino")
    ]
    results = compare(*models, ["a red cube"])
    assert {result.part for result in results} >= {"text_encoder", "denoiser", "vae_decoder"}
    for result in results:
        assert result.relative_error < 1e-4, result
    for model in models:
        model.close()


def test_nobody_is_told_that_it_was_imported(tmp_path: Path) -> None:
    code = "import engines.backends.openvino_engine"
    environment = {**os.environ, "HOME": str(tmp_path), "CI": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not (tmp_path / "intel").exists(), "where its telemetry keeps who is who"


def test_8_bits_are_refused_where_their_sums_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "sums_8_bits", lambda: False)
    with pytest.raises(BackendUnavailable, match=r"without VNNI.*--engine onnxruntime"):
        openvino_engine.OpenVinoEngine(tmp_path / "denoiser.onnx", 1, in_8_bits=True)


def test_what_is_left_out_is_no_leftover(runner: Runner) -> None:
    """A request of OpenVINO's would draw with what it was given last."""
    engine = runner._model.engines["text_encoder"]
    tokens = torch.zeros(2, runner.info.max_tokens, dtype=torch.int64)
    sound = engine.run({"input_ids": tokens})["prompt_embeds"]
    with pytest.raises(KeyError, match="input_ids"):
        engine.run({})
    assert torch.equal(engine.run({"input_ids": tokens})["prompt_embeds"], sound)
