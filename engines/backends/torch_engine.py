"""The part's own torch module: the reference on a CPU; on a GPU fused kernels in CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.backends.engine import Variant
from engines.backends.fused import fuse, refresh
from engines.backends.graphs import Graphs, bucket_of
from engines.families.part import Part

# Of short sequences, where cuDNN gains nothing and would make a plan for every batch size first.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class TorchEngine:
    """Runs ``part.module`` in inference mode on ``device``, in the module's own type.

    On a GPU the networks that `fused` knows run in its form, channels last, and each batch size and
    image size that came before is one graph. Weights stay where they are for good: `refit` copies
    into them.
    """

    def __init__(self, part: Part, device: str) -> None:
        module = part.module.eval().to(device)
        if device == "cpu" and torch.bfloat16 in {w.dtype for w in module.parameters()}:
            # oneDNN's convolutions in bf16 take this layout as it is, and blocks are no copies.
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device = device
        self._outputs = part.outputs
        self._weights = dict(module.named_parameters())
        self._built: dict[str, Tensor] = {}  # what refit replaced, as it was, on the device
        self._module: torch.nn.Module | None = module
        self._graphs: Graphs | None = None
        self._attention: Callable[[], contextlib.AbstractContextManager[object]] = (
            functools.partial(sdpa_kernel, WITHOUT_PLANS)
            if part.name == "text_encoder" and device != "cpu"
            else contextlib.nullcontext
        )
        self.num_rows = self.num_padded_rows = 0  # since the engine was made; their ratio is waste
        if device != "cpu":
            with torch.no_grad():
                fuse(module)
            self._graphs = Graphs(self._call, device)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._graphs is None:
            moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
            return dict(zip(self._outputs, self._call(**moved), strict=True))
        rows = len(next(iter(inputs.values())))
        bucket = bucket_of(rows)
        self.num_rows += rows
        self.num_padded_rows += bucket - rows
        return dict(zip(self._outputs, self._graphs.run(inputs, rows, bucket), strict=True))

    def _call(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        assert self._module is not None, "closed"
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        with self._attention():
            result = self._module(**moved)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def weight(self, name: str) -> Tensor:
        return self._built[name] if name in self._built else self._weights[name].detach()

    @torch.no_grad()
    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        fused = weights()
        for name in self._built.keys() - fused.keys():
            self._weights[name].copy_(self._built.pop(name))
        for name, value in fused.items():
            if name not in self._built:
                self._built[name] = self._weights[name].detach().clone()
            self._weights[name].copy_(value)
        if self._graphs is not None and self._module is not None:
            refresh(self._module)

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
        self._module = None
        self._weights, self._built = {}, {}
