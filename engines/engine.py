"""The contract of a backend: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Engine(Protocol):
    """One compiled part. Called from one thread at a time."""

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All inputs by name (CPU or the engine's device), all outputs by name."""

    def close(self) -> None:
        """Free what the engine holds; it is not called again."""
