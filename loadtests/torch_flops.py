"""Floating-point operations of a torch module, counted by torch itself without computing anything.

The module and its inputs go to the meta device, which has shapes and no numbers. As in
`loadtests.flops`, a multiply-add counts as two, and products and convolutions alone count.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engines.families.part import Part


def count_module_flops(module: torch.nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Of one call. The module loses its weights: hand over one that nobody else needs."""
    module = module.to("meta").eval()
    counter = FlopCounterMode(display=False)
    # Fused kernels of a CPU are not in the counter's table; the products they are made of are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        module(**{name: tensor.to("meta") for name, tensor in inputs.items()})
    return counter.get_total_flops()


def count_part_flops(part: Part, sizes: Mapping[str, int]) -> int:
    """Of one call of a part; ``sizes`` gives its symbols (batch, rows, columns) values."""
    return count_module_flops(part.module, inputs_of(part, sizes))


def inputs_of(part: Part, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs of a part without numbers, on the meta device; of texts that fill one window."""
    sizes = {"chunks": 1, **sizes}
    return {
        name: torch.empty(
            [
                fixed if dim is None else dim[1] * sizes[dim[0]]
                for fixed, dim in zip(example.shape, part.dynamic[name], strict=True)
            ],
            dtype=example.dtype,
            device="meta",
        )
        for name, example in part.example.items()
    }
