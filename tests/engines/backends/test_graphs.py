"""When a call is captured, replayed and left alone; the graph is a fake that calls again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.backends import graphs as module
from engines.backends.graphs import Graphs


class FakeGraph:
    """Replays what was called while it captured, into the outputs of then."""

    capturing: FakeGraph | None = None

    def __init__(self) -> None:
        self.again: Callable[[], None] = lambda: None

    def replay(self) -> None:
        self.again()


class Doubling:
    """What is captured: notes the rows of each call that really runs."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.error: Exception | None = None  # of the next capture

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        graph = FakeGraph.capturing
        if graph is not None and self.error is not None:
            raise self.error
        self.rows.append(len(inputs["x"]))
        outputs = (2 * inputs["x"], inputs["x"] + inputs["index"])
        if graph is not None:

            def again() -> None:
                outputs[0].copy_(2 * inputs["x"])
                outputs[1].copy_(inputs["x"] + inputs["index"])

            graph.again = again
        return outputs


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Doubling:
    @contextmanager
    def capturing(graph: FakeGraph, stream: object, pool: object) -> Iterator[None]:
        FakeGraph.capturing = graph
        try:
            yield
        finally:
            FakeGraph.capturing = None

    monkeypatch.setattr(module, "capturing", capturing)
    for name, fake in {
        "CUDAGraph": FakeGraph, "Stream": object, "synchronize": lambda: None,
        "graph_pool_handle": object,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return Doubling()


def _inputs(rows: int, first: float = 0.0) -> dict[str, Tensor]:
    return {"x": torch.arange(rows) + first, "index": torch.ones(rows, dtype=torch.int64)}


def _check(graphs: Graphs, rows: int, bucket: int, first: float = 0.0) -> list[Tensor]:
    inputs = _inputs(rows, first)
    found = graphs.run(inputs, rows, bucket)
    assert torch.equal(found[0], 2 * inputs["x"])
    assert torch.equal(found[1], inputs["x"] + 1)
    return found


def test_a_shape_is_captured_when_it_comes_again(doubling: Doubling) -> None:
    graphs = Graphs(doubling, "cpu")
    _check(graphs, 3, 3)
    assert graphs.num_captured == 0
    _check(graphs, 3, 3, 5.0)
    assert (graphs.num_captured, graphs.num_replays) == (1, 1)
    calls = len(doubling.rows)
    _check(graphs, 3, 3, 7.0)
    assert len(doubling.rows) == calls  # nothing but the graph ran
    _check(graphs, 2, 2)
    assert graphs.num_captured == 1


def test_rows_that_fill_a_bucket_up_are_never_seen(doubling: Doubling) -> None:
    graphs = Graphs(doubling, "cpu")
    _check(graphs, 10, 10)
    _check(graphs, 9, 10)
    assert doubling.rows[-1] == 10
    _check(graphs, 10, 10, 3.0)
    assert [len(each) for each in _check(graphs, 9, 10, 4.0)] == [9, 9]


def test_outputs_are_the_callers(doubling: Doubling) -> None:
    graphs = Graphs(doubling, "cpu")
    _check(graphs, 2, 2)
    kept = _check(graphs, 2, 2, 1.0)
    before = [each.clone() for each in kept]
    _check(graphs, 2, 2, 9.0)
    assert all(torch.equal(one, other) for one, other in zip(kept, before, strict=True))


def test_what_cannot_be_captured_runs_as_it_is(
    doubling: Doubling, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = Graphs(doubling, "cpu")
    doubling.error = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.ERROR):
        for first in (0.0, 1.0, 2.0, 3.0):
            _check(graphs, 2, 2, first)
    assert [record.message for record in caplog.records] == [
        "2 rows cannot be captured and run eagerly"
    ]
    assert (graphs.num_captured, graphs.num_replays) == (0, 0)


def test_without_memory_nothing_stays_and_the_next_call_captures(doubling: Doubling) -> None:
    graphs = Graphs(doubling, "cpu")
    _check(graphs, 2, 2)
    doubling.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(_inputs(2), 2, 2)
    doubling.error = None
    _check(graphs, 2, 2)
    assert graphs.num_captured == 1


def test_shapes_that_no_one_asks_for_are_forgotten(
    doubling: Doubling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_GRAPHS", 2)
    graphs = Graphs(doubling, "cpu")
    for rows in (1, 2, 1, 2, 3, 3):
        _check(graphs, rows, rows)
    captured: Any = graphs.num_captured
    assert captured == 3
    calls = len(doubling.rows)
    _check(graphs, 2, 2)  # still there
    assert len(doubling.rows) == calls
    _check(graphs, 1, 1)  # met as if for the first time
    assert graphs.num_captured == captured
