"""One training loop for every stage: schedule, average, progress, checkpoints, resume.

Knows no stage's loss. A step draws all its randomness from its own number, so that a run killed
and resumed makes the same steps as one left alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engines.errors import EngineError

CHECKPOINT_EVERY = 200  # steps: a few seconds of writing in a few minutes of training
MIN_FREE_BYTES = 2 * 2**30


class TrainingError(EngineError):
    """A stage cannot start or go on; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Course:
    """How long and how fast a stage learns.

    The rate rises over ``warmup_steps`` and falls by a cosine to nothing. ``average`` is the
    decay of the weights' exponential moving average, which is what the stage hands on.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.0
    average: float = 0.998
    max_gradient: float = 1.0

    def rate_at(self, step: int) -> float:
        """The learning rate of a 0-based step."""
        rise = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.num_steps))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run computes and keeps its work."""

    folder: Path
    device: torch.device
    seed: int = 0
    compile: bool = False
    data_share: float = 1.0  # of the recipe's samples: little for a quick trial

    def count(self, num_samples: int) -> int:
        """How many of the recipe's samples this run makes."""
        return max(32, round(num_samples * self.data_share))

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 for what tolerates it; parameters and losses stay float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Draws:
    """A step's randomness: ``numpy`` for picking, ``torch`` for noise (CPU)."""

    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> Draws:
        return cls(
            np.random.default_rng((seed, step)),
            torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63),
        )


class Average:
    """Exponential moving average of parameters, in float32."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        live = [p.detach() for p in self._parameters]
        torch._foreach_lerp_(self.values, live, 1 - decay)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Put the average in the parameters' place."""
        torch._foreach_copy_([p.detach() for p in self._parameters], self.values)


def train(
    stage: str,
    course: Course,
    place: Place,
    parameters: list[nn.Parameter],
    loss_of: Callable[[Draws], Tensor],
    extra_state: Callable[[], list[Tensor]] = list,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train ``parameters`` in place and leave their average in them.

    ``extra_state`` are tensors outside the parameters that a resumed run needs, such as a target
    network; ``after_step`` updates them. Raises TrainingError where the disk is nearly full, the
    loss is no number, or a checkpoint belongs to another course.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    _check_space(place.folder)
    optimizer = torch.optim.AdamW(
        parameters, lr=course.learning_rate, weight_decay=course.weight_decay, betas=(0.9, 0.99)
    )
    average = Average(parameters)
    keeper = _Keeper(stage, course, place, parameters, average, optimizer, extra_state)
    begin = keeper.resume()
    losses: list[float] = []
    for step in _bar(stage, begin, course.num_steps, losses):
        for group in optimizer.param_groups:
            group["lr"] = course.rate_at(step)
        loss = loss_of(Draws.of(place.seed, step))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"{stage}: the loss at step {step} is {losses[-1]}; lower --learning-rate (it was "
                f"{course.learning_rate:g}) and run again: it resumes from the last checkpoint"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, course.max_gradient)
        optimizer.step()
        optimizer.zero_grad()
        average.update(min(course.average, (step + 1) / (step + 10)))
        after_step()
        if (step + 1) % CHECKPOINT_EVERY == 0:
            keeper.save(step + 1)
    average.hand_over()
    keeper.forget()


def _bar(stage: str, begin: int, end: int, losses: list[float]) -> Iterator[int]:
    with tqdm(total=end, initial=begin, desc=stage, unit="step", mininterval=2) as bar:
        for step in range(begin, end):
            yield step
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)


class _Keeper:
    """Writes and reads a stage's checkpoint, atomically."""

    def __init__(
        self,
        stage: str,
        course: Course,
        place: Place,
        parameters: list[nn.Parameter],
        average: Average,
        optimizer: torch.optim.Optimizer,
        extra_state: Callable[[], list[Tensor]],
    ) -> None:
        self._file = place.folder / f"{stage}.checkpoint.pt"
        shapes = [list(p.shape) for p in parameters]
        run = [stage, place.seed, place.data_share]
        identity = json.dumps([run, dataclasses.asdict(course), shapes])
        self._identity = hashlib.sha256(identity.encode()).hexdigest()
        self._parameters, self._average = parameters, average
        self._optimizer, self._extra = optimizer, extra_state

    def resume(self) -> int:
        """The step to begin with: 0, or where the checkpoint ends."""
        if not self._file.exists():
            return 0
        state = torch.load(self._file, map_location="cpu", weights_only=True)
        if state["identity"] != self._identity:
            raise TrainingError(
                f"{self._file} belongs to a run with other settings; give this run another "
                "--work folder, or delete the file to begin anew"
            )
        with torch.no_grad():
            for group, saved in (
                (self._parameters, state["parameters"]),
                (self._average.values, state["average"]),
                (self._extra(), state["extra"]),
            ):
                for tensor, value in zip(group, saved, strict=True):
                    tensor.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def save(self, step: int) -> None:
        _check_space(self._file.parent)
        partial = self._file.with_suffix(".partial")
        torch.save(
            {
                "identity": self._identity,
                "step": step,
                "parameters": [p.detach() for p in self._parameters],
                "average": self._average.values,
                "extra": self._extra(),
                "optimizer": self._optimizer.state_dict(),
            },
            partial,
        )
        partial.replace(self._file)

    def forget(self) -> None:
        self._file.unlink(missing_ok=True)


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise TrainingError(
            f"--work {folder} has {free / 2**30:.1f} GB free; training needs "
            f"{MIN_FREE_BYTES / 2**30:.0f} GB: free some or choose another folder"
        )
