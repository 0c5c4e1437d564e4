"""Engines to hold the product's against: the same modules with one thing done, or nothing.

Under the same runner, so that what differs in a table is the engine alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engines.backends.engine import Variant
from engines.families.part import Part

Outputs = tuple[Tensor, ...]
EAGER_RUNS = 3  # before a capture: cuDNN chooses, cuBLAS takes its workspace


class PlainEngine:
    """`engines.backends.engine.Engine` over ``part.module``: eager, as graphs, or compiled."""

    def __init__(
        self,
        part: Part,
        device: str,
        *,
        channels_last: bool = False,
        graphs: bool = False,
        compiled: bool = False,
    ) -> None:
        module = part.module.eval().to(device)
        if channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        compiled &= part.name != "text_encoder"  # a hundredth of an image's work
        backend = "inductor" if device == "cuda" else "eager"
        self._call: Callable[..., Tensor | Outputs] = (
            torch.compile(module, dynamic=False, backend=backend) if compiled else module
        )
        self._device, self._outputs, self._compiled = device, part.outputs, compiled
        self._graphs: dict[tuple[torch.Size, ...], Graph] | None = {} if graphs else None

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Compiled code is guarded by what its inputs are: copies made here are all of one kind,
        # while those of a row's first step were made outside inference mode and later ones in it.
        moved = {
            name: tensor.to(self._device, copy=self._compiled) for name, tensor in inputs.items()
        }
        if self._graphs is None:
            values = _tuple(self._call(**moved))
        else:
            key = tuple(tensor.shape for tensor in moved.values())
            if key not in self._graphs:
                self._graphs[key] = Graph(self._call, moved)
            values = self._graphs[key].run(moved)
        return dict(zip(self._outputs, values, strict=True))

    def weight(self, name: str) -> Tensor:
        raise NotImplementedError("nothing here is refitted")

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        raise NotImplementedError("nothing here is refitted")

    def close(self) -> None:
        self._graphs = None


class Graph:
    """A call captured over inputs of its own; on a CPU the call itself."""

    def __init__(self, call: Callable[..., Tensor | Outputs], inputs: Mapping[str, Tensor]) -> None:
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._values: Outputs = ()
        begun = time.perf_counter()
        if next(iter(inputs.values())).is_cuda:
            self._capture()
        self.seconds = time.perf_counter() - begun

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(EAGER_RUNS):
                self._call(**self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._values = _tuple(self._call(**self._inputs))
        torch.cuda.synchronize()

    def run(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Outputs of the caller's own: the next replay overwrites the graph's."""
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        if self._graph is None:
            return _tuple(self._call(**self._inputs))
        self._graph.replay()
        return tuple(value.clone() for value in self._values)


def _tuple(values: Tensor | Outputs) -> Outputs:
    return (values,) if isinstance(values, Tensor) else values
