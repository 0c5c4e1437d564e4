"""A runner whose heavy parts sleep as long as a GPU of `timing.GPU_SHAPED` would compute.

Tokenizer, text encoder, noise and sampling are the product's own; the pictures are empty.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engines.backends.engine import Variant
from engines.drawing.model import load_model
from engines.drawing.runner import Runner
from engines.order import Order
from loadtests.timing import GPU_SHAPED


class SleepingEngine:
    """Takes the time of an engine call, then returns zeros."""

    def __init__(self, part: str) -> None:
        self._fixed_s, self._per_row_s = (
            GPU_SHAPED.step if part == "denoiser" else GPU_SHAPED.decode
        )
        self._part = part

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sample = inputs["sample"] if self._part == "denoiser" else inputs["latents"]
        rows, _, height, width = sample.shape
        time.sleep(self._fixed_s + self._per_row_s * rows)
        if self._part == "denoiser":
            return {"next_sample": sample, "denoised": sample}
        return {"pixels": torch.zeros(rows, 8 * height, 8 * width, 3, dtype=torch.uint8)}

    def weight(self, name: str) -> Tensor:
        raise KeyError(name)  # it has none, so that LoRAs are refused

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        pass

    def close(self) -> None:
        pass


def open_sleeping(model: str, cache_dir: Path) -> Runner:
    """The model with sleeping doubles for the denoiser and the decoder."""
    order = Order(model, "onnxruntime", cache_dir=cache_dir, num_threads=1)
    loaded = load_model(order, lambda what, done, total: None)
    doubles = {part: SleepingEngine(part) for part in ("denoiser", "vae_decoder")}
    loaded = dataclasses.replace(loaded, engines={**loaded.engines, **doubles})
    limits = GPU_SHAPED.limits
    runner = Runner(loaded, max_batch=limits.max_batch)
    # The model itself is loaded for a CPU, which decodes fewer rows at once.
    runner.info = dataclasses.replace(runner.info, max_decode_batch=limits.max_decode_batch)
    return runner
