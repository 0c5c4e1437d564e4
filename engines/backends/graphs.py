"""Calls of one function as CUDA graphs, one for each shape of its inputs.

A shape met for the first time runs as it is; the second time it is captured, from then on replayed.
So whatever is warmed up twice costs one launch, and a size that came once costs no memory. Knows
nothing of models; the weights that a function reads may change, as long as they stay in place.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engines.backends.captures import capturing

logger = logging.getLogger("fourstep.graphs")
MAX_GRAPHS = 64  # least recently used ones are dropped; the sizes that are warmed up are 8 to 20
Call = Callable[..., tuple[Tensor, ...]]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def bucket_of(num_rows: int) -> int:
    """Rows that a call is filled up to where each count has a CUDA graph of its own.

    Up to 8 it is taken as it is; above that graphs are few and at most a quarter is added.
    """
    step = 1 << max(0, (num_rows - 1).bit_length() - 3)  # 9 to 16: 2, 17 to 32: 4
    return -(-num_rows // step) * step


class Graphs:
    """``call`` takes named tensors whose first axis is the batch, and returns such tensors.

    Everything runs on the calling thread's current stream; outputs belong to the caller.
    """

    def __init__(self, call: Call, device: str) -> None:
        self._call, self._device = call, device
        self._met: OrderedDict[Shapes, _Captured | None] = OrderedDict()  # None: met once
        self._pool: Any = None  # shared: no two graphs run at a time
        self.num_captured = 0
        self.num_replays = 0

    def run(self, inputs: Mapping[str, Tensor], num_rows: int, bucket: int) -> list[Tensor]:
        """Outputs of ``num_rows``, by a graph of ``bucket`` rows where there is one.

        Raises:
            torch.OutOfMemoryError: nothing of this call stays.
        """
        shapes: Shapes = tuple((name, (bucket, *t.shape[1:])) for name, t in inputs.items())
        if shapes not in self._met:
            found = list(self._call(**inputs))
            self._met[shapes] = None
            self._forget()
            return found
        captured = self._met[shapes]
        if captured is None:
            captured = self._capture(inputs, num_rows, bucket)
            self._met[shapes] = captured
            self._forget()
        self._met.move_to_end(shapes)
        if captured.graph is None:
            return list(self._call(**inputs))
        captured.fill(inputs, num_rows)
        captured.graph.replay()
        self.num_replays += 1
        return [output[:num_rows].clone() for output in captured.outputs]

    def _capture(self, inputs: Mapping[str, Tensor], num_rows: int, bucket: int) -> _Captured:
        captured = _Captured(inputs, bucket, self._device)
        captured.fill(inputs, num_rows)
        self._call(**captured.inputs)  # kernels are compiled and algorithms chosen outside
        torch.cuda.synchronize()
        if not any(each is not None and each.graph for each in self._met.values()):
            self._pool = torch.cuda.graph_pool_handle()  # one whose last graph died is gone
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, torch.cuda.Stream(), self._pool):  # type: ignore[no-untyped-call]
                captured.outputs = self._call(**captured.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            logger.exception("%d rows cannot be captured and run eagerly", bucket)
            return captured
        captured.graph = graph
        self.num_captured += 1
        return captured

    def _forget(self) -> None:
        while len(self._met) > MAX_GRAPHS:
            self._met.popitem(last=False)

    def close(self) -> None:
        """Free the graphs and their memory."""
        self._met.clear()


class _Captured:
    """A graph with the tensors it reads and writes; no graph where none could be made."""

    def __init__(self, inputs: Mapping[str, Tensor], bucket: int, device: str) -> None:
        # Zeros: rows that fill a batch up must be valid input, indices above all.
        self.inputs = {
            name: torch.zeros((bucket, *value.shape[1:]), dtype=value.dtype, device=device)
            for name, value in inputs.items()
        }
        self.outputs: tuple[Tensor, ...] = ()
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, inputs: Mapping[str, Tensor], num_rows: int) -> None:
        """Copy the rows in; what lies on the GPU in one launch for each type."""
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for name, value in inputs.items():
            to = self.inputs[name]
            to = to if len(to) == num_rows else to[:num_rows]
            if value.device.type == to.device.type:
                pair = by_type.setdefault(value.dtype, ([], []))
                pair[0].append(to)
                pair[1].append(value)
            else:
                to.copy_(value, non_blocking=True)
        for targets, values in by_type.values():
            torch._foreach_copy_(targets, values)
