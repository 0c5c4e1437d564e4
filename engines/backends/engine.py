"""The contract of a backend: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


Variant = tuple[tuple[str, float], ...]  # names a set of weights; (): the built ones


class Engine(Protocol):
    """One compiled part.

    ``run`` is called from as many threads at a time as ``Model.max_calls`` says, all else by one
    alone, while nothing runs.
    """

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All inputs by name (CPU or the engine's device), all outputs by name."""

    def weight(self, name: str) -> Tensor:
        """A weight as it was built, where the engine keeps it (the CPU or its device), not to be
        changed; KeyError where the part has none of that name."""

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """From now on ``weights()`` stand in for the built ones, and no others do.

        They are always the same for one ``variant``: an engine that still holds it asks for none.
        """

    def close(self) -> None:
        """Free what the engine holds; it is not called again."""
