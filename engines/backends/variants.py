"""What an engine keeps of recent sets of weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from engines.backends.engine import Variant

T = TypeVar("T")
# What is opened anew costs half a second even on a small model. Each holds weights of its own,
# about the file's size (packed for the kernels, they cannot be shared): a small model keeps dozens,
# one of gigabytes only what it runs.
KEPT_BYTES = 2**30


class Variants(Generic[T]):
    """Of each variant used of late what was opened for it, at most ``most`` of them."""

    def __init__(self, built: T, most: int) -> None:
        """``built``: of the built weights."""
        self._opened: OrderedDict[Variant, T] = OrderedDict({(): built})
        self._most = max(1, most)

    def take(self, variant: Variant, open_it: Callable[[], T]) -> T:
        """What is held of it, or what ``open_it`` gives, for which there is room by then: whoever
        calls must hold no other one himself.
        """
        if variant not in self._opened:
            while len(self._opened) >= self._most:
                self._opened.popitem(last=False)
            self._opened[variant] = open_it()
        self._opened.move_to_end(variant)
        return self._opened[variant]

    def __len__(self) -> int:
        return len(self._opened)

    def clear(self) -> None:
        self._opened.clear()
