"""CUDA graphs that cannot be captured, and contexts that share memory. No GPU: both are faked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.backends import contexts
from engines.backends.captures import capturing
from engines.backends.contexts import Contexts
from engines.backends.tensorrt_engine import _Slot


class FakeCuda:
    """What torch does for a capture; ``fail`` makes its end fail, as the driver's own does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: Any = "before"
        self.fail = False
        self.num_captures = self.most_at_once = 0
        self._captures = 0
        self.num_resets = self.num_replays = 0
        graph = SimpleNamespace(reset=self._reset, replay=self._replay)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        monkeypatch.setattr(torch.cuda, "graph", self._graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda s: setattr(self, "current", s))

    def _reset(self) -> None:
        self.num_resets += 1

    def _replay(self) -> None:
        self.num_replays += 1

    @contextmanager
    def _graph(self, graph: Any, **options: Any) -> Iterator[None]:
        assert options["capture_error_mode"] == "thread_local"
        self._captures += 1
        self.num_captures += 1
        self.most_at_once = max(self.most_at_once, self._captures)
        before, self.current = self.current, options["stream"]
        try:
            yield
        finally:
            self._captures -= 1
            if self.fail:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def _slot() -> tuple[_Slot, list[int]]:
    runs: list[int] = []
    stream: Any = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    context = SimpleNamespace(execute_async_v3=lambda handle: runs.append(handle) is None)
    return _Slot(context, {"x": torch.zeros(2, 3)}, stream, SimpleNamespace(last_error="")), runs


def test_a_shape_runs_once_and_is_then_replayed(cuda: FakeCuda) -> None:
    slot, runs = _slot()
    for _ in range(3):
        slot.launch()
    assert (len(runs), cuda.num_captures, cuda.num_replays) == (2, 1, 2)
    slot.forget_graph()
    slot.launch()
    assert cuda.num_captures == 2


def test_a_capture_that_fails_leaves_the_shape_eager(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.fail = True
    slot, runs = _slot()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            slot.launch()
        slot.forget_graph()  # a refit
        slot.launch()
    assert len(runs) == 5  # one of them into the capture
    assert (cuda.num_captures, cuda.num_replays, cuda.num_resets) == (1, 0, 1)
    assert cuda.current == "before"
    assert [record.message.split(":")[0] for record in caplog.records] == ["no CUDA graph of {'x'"]


def test_captures_of_a_process_wait_for_each_other(cuda: FakeCuda) -> None:
    stream: Any = SimpleNamespace()
    inside = threading.Barrier(2)

    def capture() -> None:
        with capturing(torch.cuda.CUDAGraph(), stream), pytest.raises(threading.BrokenBarrierError):
            inside.wait(0.05)  # nobody else comes

    threads = [threading.Thread(target=capture) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (cuda.num_captures, cuda.most_at_once) == (3, 1)


class FakeEngine:
    """Makes contexts that note the memory they are given."""

    device_memory_size_v2 = 4096

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def create_execution_context(self, *arguments: Any) -> Any:
        self.asked.append(arguments)
        context = SimpleNamespace(memory=None)
        context.set_device_memory = lambda *memory: setattr(context, "memory", memory)
        return context

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(set_runtime_cache=lambda cache: None)
        config.create_runtime_cache = lambda: SimpleNamespace(serialize=lambda: b"kernels")
        config.set_execution_context_allocation_strategy = lambda kind: setattr(
            config, "strategy", kind
        )
        return config


STRATEGIES = SimpleNamespace(STATIC="static", USER_MANAGED="user")
TENSORRT = SimpleNamespace(ExecutionContextAllocationStrategy=STRATEGIES)
RTX = SimpleNamespace(
    ExecutionContextAllocationStrategy=STRATEGIES, ComputeCapability=SimpleNamespace(),
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
)  # fmt: skip


@pytest.mark.parametrize("trt", [TENSORRT, RTX], ids=["tensorrt", "tensorrt-rtx"])
def test_contexts_share_one_block(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = []

    def allocate(num_bytes: int) -> torch.Tensor:
        blocks.append(torch.empty(num_bytes, dtype=torch.uint8))
        return blocks[-1]

    monkeypatch.setattr(contexts, "_allocate", allocate)
    engine = FakeEngine()
    made = Contexts(trt, engine, tmp_path / "cache")
    first, second = made.make(), made.make()
    assert first.memory == second.memory == (blocks[0].data_ptr(), 4096)
    assert len(blocks) == 1
    (asked,) = engine.asked[0]
    assert asked == "user" if trt is TENSORRT else asked.strategy == "user"
    made.close()
    assert (tmp_path / "cache").exists() == (trt is RTX)


def test_a_package_that_cannot_share_does_not(tmp_path: Path) -> None:
    engine = FakeEngine()
    assert Contexts(SimpleNamespace(), engine, tmp_path / "cache").make().memory is None
    assert engine.asked == [()]


def test_tensorrt_rtx_has_what_sharing_needs() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="wheels for Linux x86-64 only")
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    for kind, name in (
        (trt.ICudaEngine, "device_memory_size_v2"),
        (trt.IExecutionContext, "set_device_memory"),
        (trt.IRuntimeConfig, "set_execution_context_allocation_strategy"),
    ):
        assert hasattr(kind, name)
