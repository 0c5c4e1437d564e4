"""The reference backend: the part's own torch module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engines.families.part import Part


class TorchEngine:
    """Runs ``part.module`` in inference mode on ``device``."""

    def __init__(self, part: Part, device: str) -> None:
        self._module: torch.nn.Module | None = part.module.eval().to(device)
        self._device = device
        self._outputs = part.outputs

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._module is not None, "closed"
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        result = self._module(**moved)
        values = (result,) if isinstance(result, Tensor) else result
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        self._module = None
