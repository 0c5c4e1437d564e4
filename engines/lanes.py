"""The rows of a denoise call laid out as the denoiser's inputs, one lane for each row of its batch.

Made when rows meet and good for as many steps as no row joins or leaves: what does not change from
one step to the next is gathered once, and the latents of a step are the sample of the next without
a copy. Owns no noise and makes no engine call: see `engines.runner`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engines.drawing import Drawing


class Lanes:
    """Rows of one group, a lane each and a second one for guidance.

    Each row has its embeddings, its latents and, where its next step adds any, its noise. What
    comes from the tables stays on the CPU, where an engine finds it; the rest is on ``device``.
    """

    def __init__(self, drawings: Sequence[Drawing], device: str) -> None:
        self._drawings = tuple(drawings)
        self._step_indices = [drawing.step_index for drawing in drawings]
        owners = [drawing for drawing in drawings for _ in range(drawing.num_lanes)]
        self._owners = owners
        self._first: list[int] = []  # lane of each row
        self._coefficients = np.empty((len(owners), 6), np.float32)
        self._timestep = np.empty(len(owners), np.float32)
        guidance = np.ones(len(owners), np.float32)
        uncond = np.arange(len(owners))
        lane = 0
        for drawing in drawings:
            self._first.append(lane)
            if drawing.num_lanes == 2:  # the second lane holds the unconditional prediction
                guidance[lane] = drawing.recipe.guidance_scale
                uncond[lane] = lane + 1
            lane += drawing.num_lanes
        embeds = [each for drawing in drawings for each in drawing.prompt_embeds or ()]
        assert len(embeds) == len(owners), "encode_text comes first"
        self._sample: Tensor | None = None  # of the next step, where the last one left it whole
        self._inputs = {
            "prompt_embeds": torch.stack(embeds),
            "coefficients": torch.from_numpy(self._coefficients),
            "timestep": torch.from_numpy(self._timestep),
            "guidance": torch.from_numpy(guidance).to(device),
            "uncond_index": torch.from_numpy(uncond).to(device),
        }
        conds = [drawing.timestep_cond for drawing in owners if drawing.timestep_cond is not None]
        if conds:
            self._inputs["timestep_cond"] = torch.stack(conds).to(device)

    def hold(self, drawings: Sequence[Drawing]) -> bool:
        """Whether these are exactly the rows laid out here, in their order, as they were left."""
        return (
            len(drawings) == len(self._drawings)
            and all(one is other for one, other in zip(drawings, self._drawings, strict=True))
            and self._step_indices == [drawing.step_index for drawing in drawings]
        )

    def inputs(self) -> dict[str, Tensor]:
        """What the denoiser takes for the next step of each row; shapes as `Denoiser` has them."""
        for lane, drawing in enumerate(self._owners):
            schedule, step = drawing.schedule, drawing.step_index
            self._coefficients[lane] = schedule.coefficients[step]
            self._timestep[lane] = schedule.timesteps[step]
        noise = torch.stack([_noise(drawing) for drawing in self._owners])
        sample = self._sample
        if sample is None:
            sample = torch.stack([_latents(drawing) for drawing in self._owners])
        return {**self._inputs, "sample": sample, "noise": noise}

    def advance(self, outputs: Mapping[str, Tensor]) -> None:
        """Take the step's outcome to the rows."""
        next_sample = outputs["next_sample"]  # [B, C, h, w], as denoised
        latents, denoised = next_sample.unbind(0), outputs["denoised"].unbind(0)
        for drawing, lane in zip(self._drawings, self._first, strict=True):
            drawing.latents, drawing.denoised = latents[lane], denoised[lane]
            drawing.step_noise = None
            drawing.step_index += 1
        self._step_indices = [drawing.step_index for drawing in self._drawings]
        # Of a guided row the second lane's outcome belongs to nobody.
        self._sample = next_sample if len(self._drawings) == len(self._owners) else None


@functools.lru_cache(maxsize=64)  # one for each size
def _silence(shape: torch.Size) -> Tensor:
    """For a row whose step adds no noise: its coefficient r is 0. Not to be changed in place."""
    return torch.zeros(shape)


def _noise(drawing: Drawing) -> Tensor:
    noise = drawing.step_noise
    return _silence(_latents(drawing).shape) if noise is None else noise


def _latents(drawing: Drawing) -> Tensor:
    assert drawing.latents is not None, "the first noise is drawn before a step"
    return drawing.latents
