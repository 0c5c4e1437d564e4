"""A runner whose heavy parts sleep as long as a GPU of `timing.GPU_SHAPED` would compute.

Tokenizer, text encoder, noise and sampling are the product's own; the pictures are empty.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engines.backends.engine import Variant
from engines.drawing.batching import CUDA_DECODE_ROWS
from engines.drawing.model import load_model
from engines.drawing.runner import Runner
from engines.order import Order
from loadtests.timing import GPU_SHAPED

COSTS = {
    "denoiser": GPU_SHAPED.step,
    "vae_decoder": GPU_SHAPED.decode,
    "tiny_vae_decoder": GPU_SHAPED.tiny_decode,
    "vae_encoder": GPU_SHAPED.encode,
    "tiny_vae_encoder": GPU_SHAPED.tiny_encode,
}
INPUTS = {"denoiser": "sample", "vae_encoder": "pixels", "tiny_vae_encoder": "pixels"}


class SleepingEngine:
    """Takes the time of an engine call, then returns zeros."""

    def __init__(self, part: str, draws_clips: bool = False) -> None:
        self._draws_clips = draws_clips  # their frames are put together of what is not rounded yet
        self._fixed_s, self._per_row_s = COSTS[part]
        self._part = part

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encodes = self._part.endswith("vae_encoder")
        sample = inputs[INPUTS.get(self._part, "latents")]
        if encodes:  # [B, H, W, 3]
            sample = torch.zeros(len(sample), 4, *(side // 8 for side in sample.shape[1:3]))
        rows, _, *frames, height, width = sample.shape
        time.sleep(self._fixed_s + self._per_row_s * rows * math.prod(frames))
        if encodes:
            return {"mean": sample, **({"std": sample} if self._part == "vae_encoder" else {})}
        if self._part == "denoiser":
            return {"next_sample": sample, "denoised": sample}
        pixels = torch.zeros(rows, 8 * height, 8 * width, 3, dtype=torch.uint8)
        return {"pixels": pixels, **({"image": pixels.float()} if self._draws_clips else {})}

    def weight(self, name: str) -> Tensor:
        raise KeyError(name)  # it has none, so that LoRAs are refused

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        pass

    def close(self) -> None:
        pass


def open_sleeping(
    model: str, cache_dir: Path, backend: str = "onnxruntime", max_batch: int | None = None
) -> Runner:
    """The model with sleeping doubles for the denoiser and the VAE. ``max_batch``: lanes of a
    denoise call, of a decode no more than the double has.
    """
    order = Order(model, backend, cache_dir=cache_dir, num_threads=1)
    loaded = load_model(order, lambda what, done, total: None)
    clips = loaded.facts.draws_clips
    doubles = {part: SleepingEngine(part, clips) for part in COSTS if part in loaded.engines}
    loaded = dataclasses.replace(loaded, engines={**loaded.engines, **doubles})
    limits = GPU_SHAPED.limits
    runner = Runner(loaded, max_batch=max_batch or limits.max_batch)
    # The model itself is loaded for a CPU, which decodes fewer rows at once.
    num_decoded = CUDA_DECODE_ROWS if clips else limits.max_decode_batch
    runner.info = dataclasses.replace(runner.info, max_decode_batch=num_decoded)
    return runner
