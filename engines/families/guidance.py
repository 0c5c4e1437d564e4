"""The guidance weight as an input of the denoiser, for models distilled with it."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)  # most requests leave w at the model's default
def guidance_embedding(w: float, dim: int) -> Tensor:
    """Sinusoidal embedding of the guidance weight w, float32 ``[dim]``; not to be changed in place.

    Agrees with ``LatentConsistencyModelPipeline.get_guidance_scale_embedding`` (w times 1000).
    """
    half = dim // 2
    freqs = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor(w, dtype=torch.float32) * 1000.0 * freqs
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)])
    return torch.nn.functional.pad(embedding, (0, dim % 2))
