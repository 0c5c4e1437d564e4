"""What the text encoder said of the texts that came lately: most prompts come more than once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from engines.backends.adapters import AdapterSet

Tokens = Mapping[str, np.ndarray]  # a text by the text encoder's inputs: int64 [L] each, padded
Encoded = Mapping[str, Tensor]  # a text by the text encoder's outputs, without the batch
NUM_KEPT = 1024


def key_of(tokens: Tokens) -> bytes:
    """Equal for texts of the same tokens."""
    return b"".join(ids.tobytes() for ids in tokens.values())


class Prompts:
    """The last texts by LoRAs and key. Any thread may ask and add."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[AdapterSet, bytes], Encoded] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, loras: AdapterSet, key: bytes) -> Encoded | None:
        with self._lock:
            found = self._kept.get((loras, key))
            if found is not None:
                self._kept.move_to_end((loras, key))
            return found

    def add(self, loras: AdapterSet, key: bytes, encoded: Encoded) -> None:
        with self._lock:
            self._kept[loras, key] = encoded
            while len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
