"""What a failing engine call is called, and what becomes of its rows. A GPU's calls are faked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.drawing import noise as module
from engines.drawing import transfers
from engines.drawing.drawing import Drawing
from engines.drawing.faults import faults_of
from engines.drawing.model import load_model
from engines.drawing.runner import Runner
from engines.drawing.succession import Succession
from engines.errors import BackendUnavailable, DeviceLost, OutOfMemory
from engines.order import Order
from tests.engines.peers import recipe


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_no_memory_is_one_error(error: Exception) -> None:
    with pytest.raises(OutOfMemory, match="no memory for denoiser of 3 rows"):  # noqa: SIM117
        with faults_of("denoiser", 3, "cpu"):
            raise error


@pytest.mark.parametrize("error", [RuntimeError("shape"), BackendUnavailable("no profile")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), faults_of("denoiser", 1, "cpu"):
        raise error


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU is asked to do, by name; it does nothing."""
    calls: list[str] = []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    return calls


def test_a_gpu_without_memory_gives_back_what_it_keeps(cuda: list[str]) -> None:
    with pytest.raises(OutOfMemory), faults_of("denoiser", 1, "cuda"):
        raise torch.OutOfMemoryError
    assert cuda == ["synchronize", "empty_cache"]


def test_a_gpu_that_still_answers_is_not_lost(cuda: list[str]) -> None:
    with pytest.raises(RuntimeError, match="shape"), faults_of("denoiser", 1, "cuda"):
        raise RuntimeError("shape")
    assert cuda == ["synchronize"]


def test_a_gpu_that_answers_no_more_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    sticky = "CUDA error: an illegal memory access was encountered"

    def answer() -> None:
        raise RuntimeError(sticky)

    monkeypatch.setattr(torch.cuda, "synchronize", answer)
    with pytest.raises(DeviceLost, match=rf"vae_decoder of 2 rows.*{sticky}") as caught:  # noqa: SIM117
        with faults_of("vae_decoder", 2, "cuda"):
            raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")
    assert isinstance(caught.value.__context__, RuntimeError)


@pytest.fixture
def runner(lcm_checkpoint: Path) -> Runner:
    return Runner(load_model(Order(str(lcm_checkpoint), "torch"), lambda *_: None), max_batch=4)


def test_noise_that_finds_no_memory_is_drawn_again_the_same(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second row's, on its way to the device; then there is some."""
    picture = np.full((64, 64, 3), 90, np.uint8)
    wanted = [recipe(seed=seed, image=picture, sampler="lcm") for seed in range(2)]
    expected = [drawing.pixels for drawing in runner.draw(wanted)]
    rows = [runner.start(each) for each in wanted]
    runner.encode_text(rows)
    draw, moved = module.draw_noise, []

    def draw_once(drawing: Drawing) -> Tensor:
        moved.append(drawing)
        noise = draw(drawing)
        if drawing is rows[1] and moved.count(drawing) == 1:
            raise torch.OutOfMemoryError
        return noise

    monkeypatch.setattr(module, "draw_noise", draw_once)
    with pytest.raises(OutOfMemory, match="of 2 rows"):
        runner.encode_image(rows)
    runner.encode_image(rows)
    _finish(runner, rows, expected)


def test_rows_that_find_no_memory_together_draw_the_same_pictures(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and noise laid out for a step, and noise for the next one while it runs."""
    wanted = [recipe(seed=seed, sampler="lcm") for seed in range(2)]
    expected = [drawing.pixels for drawing in runner.draw(wanted)]
    rows = [runner.start(each) for each in wanted]
    runner.encode_text(rows)
    stack, calls = transfers.stack, []

    def stack_once(tensors: Sequence[Tensor], device: str) -> Tensor:
        calls.append(len(tensors))
        if len(calls) in (3, 5, 10):  # noise; prompts of the call made again; noise ahead of a step
            raise torch.OutOfMemoryError
        return stack(tensors, device)

    monkeypatch.setattr(transfers, "stack", stack_once)
    for _ in range(2):
        with pytest.raises(OutOfMemory, match="of 2 rows"):
            runner.denoise(rows)
    assert [row.step_index for row in rows] == [0, 0]
    _finish(runner, rows, expected)


def _finish(runner: Runner, rows: list[Drawing], expected: list[np.ndarray]) -> None:
    while rows[0].step_index < rows[0].num_steps:
        runner.denoise(rows)
    runner.decode(rows)
    for row, pixels in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(row.pixels, pixels)


def test_a_successor_finds_the_memory_of_the_one_before(runner: Runner, cuda: list[str]) -> None:
    """torch keeps what a closed engine held, and TensorRT takes its own from what is left."""
    old = dataclasses.replace(runner._model, device="cuda")
    succession = Succession(old, lambda model: cuda.append("changed"))
    succession.follow(runner._model)
    for engine in old.engines.values():
        engine.close = lambda: cuda.append("close")  # type: ignore[method-assign]
    with succession.calling():
        assert succession.model is runner._model
    assert cuda == ["changed", *["close"] * len(old.engines), "empty_cache"]
