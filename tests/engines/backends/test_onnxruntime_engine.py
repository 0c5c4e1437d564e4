"""A batch cut over threads: the same results, every row in one part, and faults of any part."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from engines.backends import onnxruntime_engine
from engines.backends.onnxruntime_engine import Cores, OnnxRuntimeEngine, cut
from engines.drawing.runner import Runner
from engines.order import Order
from tests.engines.checkpoints import make_lora
from tests.engines.peers import draw_together, recipe


@settings(deadline=None)
@given(guided=st.lists(st.booleans(), min_size=1, max_size=12), num_parts=st.integers(1, 12))
def test_parts_are_the_batch_and_keep_guided_rows_whole(guided: list[bool], num_parts: int) -> None:
    lanes: list[int] = []
    for two in guided:
        first = len(lanes)
        lanes += [first + 1, first + 1] if two else [first]
    num_parts = min(num_parts, len(lanes))
    names = np.arange(len(lanes))
    parts = cut({"sample": names, "uncond_index": np.asarray(lanes)}, num_parts)
    assert 1 <= len(parts) <= num_parts
    assert np.array_equal(np.concatenate([part["sample"] for part in parts]), names)
    for part in parts:
        assert len(part["sample"]) == len(part["uncond_index"]) > 0
        pointed_at = part["sample"][part["uncond_index"]]  # fails where it points outside
        assert np.array_equal(pointed_at, np.asarray(lanes)[part["sample"]])
    if not any(guided):
        sizes = [len(part["sample"]) for part in parts]
        assert len(parts) == num_parts
        assert max(sizes) - min(sizes) <= 1


@pytest.fixture(scope="module")
def cutting(checkpoints: Path, cache_dir: Path) -> Iterator[Runner]:
    runner = Runner.open(
        Order(str(checkpoints / "tiny-sd"), "onnxruntime", cache_dir=cache_dir, num_threads=3)
    )
    yield runner
    runner.close()


def test_images_are_those_of_one_thread(
    cutting: Runner, runners: dict[tuple[str, str], Runner]
) -> None:
    """Guided, unguided and image-to-image rows at once, more of them than threads."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    wanted = [
        recipe(seed=1, num_steps=3, sampler="ddim", guidance_scale=5.0, negative_prompt="dark"),
        recipe(seed=2, num_steps=2, sampler="lcm", guidance_scale=1.0),
        recipe(seed=3, num_steps=3, sampler="euler", guidance_scale=7.5),
        recipe(seed=4, num_steps=4, sampler="lcm", image=image, strength=0.6),
        recipe(seed=5, num_steps=1, sampler="tcd", guidance_scale=1.0),
    ]
    ours = draw_together(cutting, wanted)
    theirs = draw_together(runners["tiny-sd", "onnxruntime"], wanted)
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(one.latents - other.latents).max() <= 1e-5
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1


def test_a_lone_call_has_all_threads_and_two_have_half_each() -> None:
    cores = Cores(5)
    with cores.share() as first, cores.share() as second:
        assert (first, second) == (5, 2)
    with cores.share() as again:
        assert again == 5


def test_images_drawn_side_by_side_are_those_drawn_alone(
    checkpoints: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """By two threads at once, with LoRA sets that change under way."""
    folder = checkpoints / "tiny-sd"
    loras = {"one": make_lora(folder, tmp_path / "one", ["to_q", "conv1"], text_encoder=True)}
    order = Order(str(folder), "onnxruntime", cache_dir=cache_dir, num_threads=2, loras=loras)
    runner = Runner.open(order)
    assert runner.info.max_calls == 2
    sets: list[dict[str, float]] = [{}, {"one": 0.8}, {"one": -0.5}]
    wanted = [
        recipe(
            seed=seed, num_steps=1 + seed % 4, prompt=f"a cube {seed % 3}", loras=sets[seed % 3],
            sampler=("lcm", "ddim")[seed % 2], guidance_scale=(1.0, 4.0)[seed % 2],
        )
        for seed in range(18)
    ]  # fmt: skip
    alone = [draw_together(runner, [each])[0] for each in wanted]
    runner._prompts.clear()
    with ThreadPoolExecutor(2) as pool:
        batches = [wanted[start : start + 3] for start in range(0, len(wanted), 3)]
        found = [result for results in pool.map(lambda b: draw_together(runner, b), batches)
                 for result in results]  # fmt: skip
    for one, other in zip(found, alone, strict=True):
        assert np.abs(one.latents - other.latents).max() <= 1e-5
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1
    runner.close()


def test_a_fault_in_any_part_is_the_calls_and_leaves_nothing_behind(cutting: Runner) -> None:
    engine = cutting._model.engines["text_encoder"]
    tokens = torch.zeros(6, cutting.info.max_tokens, dtype=torch.int64)
    sound = engine.run({"input_ids": tokens})["prompt_embeds"]
    for row in (0, 5):
        bad = tokens.clone()
        bad[row] = 10**6  # beyond the vocabulary
        with pytest.raises(InvalidArgument, match="out of data bounds"):
            engine.run({"input_ids": bad})
        assert torch.equal(engine.run({"input_ids": tokens})["prompt_embeds"], sound)


def test_large_models_are_held_in_memory_once(
    checkpoints: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_engine, "KEPT_BYTES", 0)
    order = Order(str(checkpoints / "tiny-sd"), "onnxruntime", cache_dir=cache_dir, num_threads=2)
    runner = Runner.open(order)
    engine = runner._model.engines["denoiser"]
    assert isinstance(engine, OnnxRuntimeEngine)
    assert engine._sessions is not None
    assert engine._sessions.single is None
    draw_together(runner, [recipe(seed=seed, num_steps=1) for seed in range(3)])
    runner.close()
