"""One image on its way: what was asked for, and the tensors an engine takes one step further."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from engines.backends.adapters import AdapterSet
from engines.drawing.stage import Stage
from engines.samplers import Schedule


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What one image is to be. ``image`` (uint8 ``[H, W, 3]``) makes it image-to-image."""

    prompt: str
    width_px: int
    height_px: int
    seed: int
    num_steps: int
    guidance_scale: float
    sampler: str
    negative_prompt: str = ""
    strength: float = 1.0
    eta: float | None = None
    image: np.ndarray | None = None
    num_previews: int = 0
    loras: Mapping[str, float] = field(default_factory=dict)  # name → λ, of those allowed


class Group(NamedTuple):
    """What rows must have in common to share an engine call."""

    rows: int  # of the latents
    columns: int
    loras: AdapterSet


@dataclass(slots=True, eq=False)
class Drawing:
    """One row: made by `Runner.start`, advanced in place by the runner's engine calls."""

    recipe: Recipe
    schedule: Schedule
    group: Group
    num_lanes: int  # 2 where classifier-free guidance needs an unconditional row
    generator: torch.Generator  # the row's own, on the CPU: results ignore neighbours and devices
    token_ids: tuple[np.ndarray, ...]  # int64 [L]: the prompt's, then the negative prompt's
    num_truncated_tokens: tuple[int, ...] = ()  # of each text: what its window has no room for
    timestep_cond: torch.Tensor | None = None  # float32 [K], filled at start
    prompt_embeds: tuple[torch.Tensor, ...] | None = None  # float32 [L, D] each, by encode_text
    latents: torch.Tensor | None = None  # float32 [C, h, w], by start or encode_image
    denoised: torch.Tensor | None = None  # float32 [C, h, w], by denoise: the current guess
    step_index: int = 0  # by denoise
    preview_steps: frozenset[int] = frozenset()  # step indices after which a preview is due
    previews: list[np.ndarray] = field(default_factory=list)  # uint8 [H, W, 3], by decode
    pixels: np.ndarray | None = None  # uint8 [H, W, 3], by decode
    # Drawn for the step that is next: a call that failed and is made again must draw no other.
    step_noise: torch.Tensor | None = None
    failure: str | None = None  # by decode, where there is nothing to decode

    @property
    def num_steps(self) -> int:
        return self.schedule.num_steps

    @property
    def stage(self) -> Stage:
        """What this row needs next."""
        if self.pixels is not None or self.failure is not None:
            return Stage.DONE
        if self.prompt_embeds is None:
            return Stage.ENCODE_TEXT
        if self.recipe.image is not None and self.latents is None:
            return Stage.ENCODE_IMAGE
        num_due = sum(step < self.step_index for step in self.preview_steps)
        if len(self.previews) < num_due:
            return Stage.PREVIEW
        return Stage.DENOISE if self.step_index < self.num_steps else Stage.DECODE


def spread_previews(num_previews: int, num_steps: int) -> frozenset[int]:
    """Evenly spaced step indices for previews; the last step is the image itself, never one."""
    count = min(num_previews, num_steps - 1)
    return frozenset(round((k + 1) * num_steps / (count + 1)) - 1 for k in range(count))


@functools.lru_cache(maxsize=256)  # most requests leave w at the model's default
def guidance_embedding(w: float, dim: int) -> torch.Tensor:
    """Sinusoidal embedding of the guidance weight w, float32 ``[dim]``; not to be changed in place.

    Agrees with ``LatentConsistencyModelPipeline.get_guidance_scale_embedding`` (w times 1000).
    """
    half = dim // 2
    freqs = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor(w, dtype=torch.float32) * 1000.0 * freqs
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)])
    return torch.nn.functional.pad(embedding, (0, dim % 2))
