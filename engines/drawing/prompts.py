"""What the text encoder said of the texts that came lately: most prompts come more than once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from engines.backends.adapters import AdapterSet

Tokens = Mapping[str, np.ndarray]  # a text by the text encoder's inputs: int64 [L] each, padded
Encoded = Mapping[str, Tensor]  # a text by the text encoder's outputs, without the batch
KEPT_BYTES = 2**28  # 1,100 texts of SD 1.5 (77 x 768 numbers), 136 of T5-XXL (120 x 4,096)
PARALLEL = 0.9995  # cosine from which sin θ is too small to divide by in half precision


def key_of(tokens: Tokens) -> bytes:
    """Equal for texts of the same tokens."""
    return b"".join(ids.tobytes() for ids in tokens.values())


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Between two tensors of one shape, each one vector: ``share`` 0 is ``start``, 1 is ``end``.

    Along the arc between them (Shoemake, "Animating rotation with quaternion curves", 1985), as
    diffusers' `AudioDiffusionPipeline.slerp`; along the chord where they are all but parallel. What
    has no numbers between, a mask, lets both through, where both count.
    """
    if not start.dtype.is_floating_point:
        return torch.maximum(start, end) if 0 < share < 1 else (start, end)[round(share)]
    a, b = start.float(), end.float()
    cosine = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    if abs(cosine) > PARALLEL:
        return torch.lerp(a, b, share).to(start.dtype)
    angle = torch.acos(cosine)
    arc = torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b
    return (arc / torch.sin(angle)).to(start.dtype)


class Prompts:
    """The last texts by LoRAs and key, in at most `KEPT_BYTES`. Any thread may ask and add."""

    def __init__(self) -> None:
        self.num_bytes = 0  # of what is kept
        self._kept: OrderedDict[tuple[AdapterSet, bytes], Encoded] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, loras: AdapterSet, key: bytes) -> Encoded | None:
        with self._lock:
            found = self._kept.get((loras, key))
            if found is not None:
                self._kept.move_to_end((loras, key))
            return found

    def add(self, loras: AdapterSet, key: bytes, encoded: Encoded) -> None:
        """Keep a copy: what is given may be a row of a batch, all of which would stay with it."""
        own = {name: value.clone() for name, value in encoded.items()}
        with self._lock:
            self._drop(self._kept.pop((loras, key), {}))
            self._kept[loras, key] = own
            self.num_bytes += _bytes_of(own)
            while self.num_bytes > KEPT_BYTES:
                self._drop(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0

    def _drop(self, encoded: Encoded) -> None:
        self.num_bytes -= _bytes_of(encoded)


def _bytes_of(encoded: Encoded) -> int:
    return sum(value.nbytes for value in encoded.values())
