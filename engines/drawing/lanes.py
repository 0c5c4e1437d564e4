"""The rows of a denoise call laid out as the denoiser's inputs, one lane for each row of its batch.

Made when rows meet and good for as many steps as no row joins or leaves: what a step reads of
schedules, guidance and conditioning goes to the device once, for all of these steps, and the
latents of a step are the sample of the next without a copy. Owns no noise, knows no conditioning
by its name and makes no engine call: see `engines.drawing.runner`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engines.drawing import transfers
from engines.drawing.drawing import Drawing
from engines.drawing.inpainting import KeptLanes

LOOKS_BACK = 6  # index of the coefficient of what the step before gave as denoised
Table = np.ndarray | Tensor  # on the host as numpy has it, which costs an operation less


class Lanes:
    """Rows of one group, a lane each and a second one for guidance.

    Each row has its conditioning, its latents and, where its next step adds any, its noise.
    """

    def __init__(self, drawings: Sequence[Drawing], device: str) -> None:
        self._device = device
        self._drawings = tuple(drawings)
        self._step_indices = [drawing.step_index for drawing in drawings]
        owners = [drawing for drawing in drawings for _ in range(drawing.num_lanes)]
        self._owners = owners
        self._first: list[int] = []  # lane of each row
        guidance = np.ones(len(owners), np.float32)
        uncond = np.arange(len(owners))
        lane = 0
        for drawing in drawings:
            assert drawing.text_encoded, "encode_text comes first"
            self._first.append(lane)
            if drawing.num_lanes == 2:  # the second lane holds the unconditional prediction
                guidance[lane] = drawing.recipe.guidance_scale
                uncond[lane] = lane + 1
            lane += drawing.num_lanes
        self._step = 0  # since these rows met
        self._sample: Tensor | None = None  # of the next step, where the last one left it whole
        self._previous: Tensor | None = None  # what it gave as denoised, likewise
        self._noise: Tensor | None = None  # of the next step, where it was laid out ahead
        tables = _tables(owners)
        num_steps = len(tables["coefficients"])
        masked = any(drawing.kept is not None for drawing in drawings)
        self._kept = KeptLanes(owners, num_steps, device) if masked else None
        self._num_coefficients = tables["coefficients"].shape[-1]
        # What the step before gave counts where its coefficient, the seventh, is not 0.
        self._looks_back = np.count_nonzero(tables["coefficients"][..., LOOKS_BACK:]) > 0
        hosted = {
            "guidance": torch.from_numpy(guidance),
            "uncond_index": torch.from_numpy(uncond),
        }
        if device != "cpu":
            hosted |= {name: torch.from_numpy(table) for name, table in tables.items()}
        there: dict[str, Tensor] = {}
        for name in drawings[0].conditioning:
            values = [value for drawing in drawings for value in drawing.condition(name)]
            if device != "cpu" and all(value.device.type == "cpu" for value in values):
                hosted[name] = torch.stack(values)
            else:
                there[name] = transfers.stack(values, device)
        self._inputs = transfers.upload(hosted, device) | there
        self._tables: dict[str, Table] = {  # a line for each step
            name: self._inputs.pop(name, table) for name, table in tables.items()
        }

    def hold(self, drawings: Sequence[Drawing]) -> bool:
        """Whether these are exactly the rows laid out here, in their order, as they were left."""
        return (
            len(drawings) == len(self._drawings)
            and all(one is other for one, other in zip(drawings, self._drawings, strict=True))
            and self._step_indices == [drawing.step_index for drawing in drawings]
        )

    def inputs(self) -> dict[str, Tensor]:
        """What the denoiser takes for the next step of each row; shapes as `Denoiser` has them."""
        if self._noise is None:
            self.lay_out_noise()
        assert self._noise is not None, "laid out just now"
        noise, self._noise = self._noise, None  # a call that is made again lays it out again
        if self._sample is None:
            self._sample = transfers.stack([_latents(each) for each in self._owners], self._device)
        if self._previous is None and self._looks_back:
            self._previous = transfers.stack([_before(each) for each in self._owners], self._device)
        inputs = {
            **self._inputs,
            **{name: _line(table, self._step) for name, table in self._tables.items()},
            "sample": self._sample,
            "noise": noise,
        }
        if self._num_coefficients > LOOKS_BACK:
            inputs["previous"] = self._sample if self._previous is None else self._previous
        return inputs

    def lay_out_noise(self) -> None:
        """The next step's noise, which its rows have drawn: best while an engine is at this one."""
        noises = [drawing.step_noise for drawing in self._owners]
        shape = _latents(self._owners[0]).shape
        if any(noise is not None for noise in noises):
            rows = [_silence(shape) if noise is None else noise for noise in noises]
            self._noise = transfers.stack(rows, self._device)
        else:
            self._noise = torch.zeros((len(noises), *shape), device=self._device)

    def advance(self, outputs: Mapping[str, Tensor]) -> None:
        """Take the step's outcome to the rows."""
        next_sample = outputs["next_sample"]  # [B, C, h, w], as denoised
        if self._kept is not None:
            next_sample = self._kept.put_back(next_sample, self._step)
        latents, denoised = next_sample.unbind(0), outputs["denoised"].unbind(0)
        for drawing, lane in zip(self._drawings, self._first, strict=True):
            drawing.latents, drawing.denoised = latents[lane], denoised[lane]
            drawing.step_noise = None
            drawing.step_index += 1
        self._step += 1
        self._step_indices = [drawing.step_index for drawing in self._drawings]
        # Of a guided row the second lane's outcome belongs to nobody.
        whole = len(self._drawings) == len(self._owners)
        self._sample = next_sample if whole else None
        self._previous = outputs["denoised"] if whole and self._looks_back else None


def _tables(owners: Sequence[Drawing]) -> dict[str, np.ndarray]:
    """What changes with the step, float32 ``[S, B, ...]`` of the S steps that all rows have."""
    num_steps = min(drawing.num_steps - drawing.step_index for drawing in owners)
    left = [slice(drawing.step_index, drawing.step_index + num_steps) for drawing in owners]
    tables = {}
    for name, first in owners[0].tables.items():
        tables[name] = table = np.empty((num_steps, len(owners), *first.shape[1:]), np.float32)
        for lane, drawing in enumerate(owners):
            table[:, lane] = drawing.tables[name][left[lane]]
    return tables


def _line(table: Table, step: int) -> Tensor:
    line = table[step]
    return line if isinstance(line, Tensor) else torch.from_numpy(line)


@functools.lru_cache(maxsize=64)  # one for each size
def _silence(shape: torch.Size) -> Tensor:
    """For a row whose step adds no noise: its coefficient r is 0. Not to be changed in place."""
    return torch.zeros(shape)


def _latents(drawing: Drawing) -> Tensor:
    assert drawing.latents is not None, "the first noise is drawn before a step"
    return drawing.latents


def _before(drawing: Drawing) -> Tensor:
    """What the step before gave as denoised; at the first step no coefficient asks for it."""
    return _latents(drawing) if drawing.denoised is None else drawing.denoised
