"""A part: one graph of a model, as a torch module with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# Input name → one entry per dimension: None (fixed), or (symbol, multiple) for `multiple · symbol`.
DynamicShapes = Mapping[str, Sequence[tuple[str, int] | None]]


@dataclass(frozen=True, slots=True)
class Part:
    """``example`` gives every input in the order of ``module.forward``. The symbols ``rows`` and
    ``columns`` count latents, or ``patch`` of them each.
    """

    name: str
    module: torch.nn.Module
    example: Mapping[str, torch.Tensor]
    dynamic: DynamicShapes
    outputs: tuple[str, ...]
    patch: int = 1
