"""A linear layer whose weights stay in 8 bits in memory, one scale for each of its outputs.

By torch they are made wide as the layer is used, one layer at a time (`Int8Linear.forward`). In
ONNX that is DequantizeLinear, which ONNX Runtime rewrites as it opens a session (README, "T5 in 8
bits").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOP = 127.0  # symmetric: -128 is not used


@torch.library.custom_op("fourstep::dequantize", mutates_args=())
def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 ``[N, K]`` and the scale ``[N]`` of each line → ``[N, K]`` in the scale's type."""
    return weight.to(scale.dtype).mul_(scale[:, None])


@dequantize.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=scale.dtype)


def dequantize_in_onnx(weight: Any, scale: Any) -> Any:
    """`dequantize` for the exporter's table of translations."""
    from onnxscript import opset21 as op  # here: serving by torch does without

    return op.DequantizeLinear(weight, scale, axis=0)


def quantised(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights ``[N, K]`` as int8 ``[N, K]`` and, in ``dtype``, a scale ``[N]``."""
    wide = weight.float()
    least = torch.finfo(torch.float16).tiny  # a line of zeros has a scale too
    scale = (wide.abs().amax(dim=1) / TOP).clamp_min(least).to(dtype)
    rounded = (wide / scale.float()[:, None]).round_().clamp_(-TOP, TOP)
    return rounded.to(torch.int8), scale


class Int8Linear(torch.nn.Module):
    """In place of a `torch.nn.Linear` without bias; computes in the type of its ``scale``."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        weight = dequantize(self.weight, self.scale)
        return torch.nn.functional.linear(features.to(weight.dtype), weight)
