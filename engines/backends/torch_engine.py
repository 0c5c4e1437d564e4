"""The reference backend: the part's own torch module."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engines.backends.engine import Variant
from engines.families.part import Part


class TorchEngine:
    """Runs ``part.module`` in inference mode on ``device``."""

    def __init__(self, part: Part, device: str) -> None:
        self._module: torch.nn.Module | None = part.module.eval().to(device)
        self._device = device
        self._outputs = part.outputs
        self._weights = dict(part.module.named_parameters())
        self._built: dict[str, Tensor] = {}  # what refit replaced, as it was, on the CPU

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._module is not None, "closed"
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        result = self._module(**moved)
        values = (result,) if isinstance(result, Tensor) else result
        return dict(zip(self._outputs, values, strict=True))

    def weight(self, name: str) -> Tensor:
        return self._built[name] if name in self._built else self._weights[name].detach().cpu()

    @torch.no_grad()
    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        fused = weights()
        for name in self._built.keys() - fused.keys():
            self._weights[name].copy_(self._built.pop(name))
        for name, value in fused.items():
            if name not in self._built:
                self._built[name] = self._weights[name].detach().cpu().clone()
            self._weights[name].copy_(value)

    def close(self) -> None:
        self._module = None
        self._weights, self._built = {}, {}
