"""Scheduler options that an operator sets over a checkpoint's own: which there are, and of what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engines.errors import CheckpointError
from engines.samplers import option_values
from engines.samplers.schedule import BETA_SCHEDULES, PREDICTIONS

CHOICES = {"beta_schedule": BETA_SCHEDULES, "prediction_type": PREDICTIONS}
LISTS = ("trained_betas",)  # no operator writes a thousand numbers
BOUNDS = {  # of numbers that others would make nonsense or NaN of
    "num_train_timesteps": (1, 100_000),
    "original_inference_steps": (1, 100_000),
    "steps_offset": (0, 100),
    "solver_order": (1, 3),
    "beta_start": (1e-9, 0.999),
    "beta_end": (1e-9, 0.999),
    "sigma_min": (1e-9, 1e6),
    "sigma_max": (1e-9, 1e6),
    "timestep_scaling": (1e-9, 1e6),
}


def check_options(given: Mapping[str, Any]) -> None:
    """Whether each is an option that a sampler here reads, with a value that it may have.

    Raises:
        CheckpointError: one is not, with what is known.
    """
    values = {name: each for name, each in option_values().items() if name not in LISTS}
    for name, value in given.items():
        if name not in values:
            known = ", ".join(sorted(values))
            raise CheckpointError(f"scheduler option {name} is not known; known are {known}")
        if (wanted := _wanted(name, value, values[name])) is not None:
            raise CheckpointError(f"scheduler option {name} is {value!r}; it must be {wanted}")


def _wanted(name: str, value: Any, known: tuple[Any, ...]) -> str | None:
    """What the option's value must be; None where it is."""
    if any(isinstance(each, bool) for each in known):
        return None if isinstance(value, bool) else "true or false"
    if choices := CHOICES.get(name) or tuple(each for each in known if isinstance(each, str)):
        return None if value in choices else f"one of {', '.join(choices)}"
    low, high = BOUNDS.get(name, (-math.inf, math.inf))
    whole = any(isinstance(each, int) for each in known)
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and low <= value <= high:
        return None
    kind = "a whole number" if whole else "a number"
    return kind if name not in BOUNDS else f"{kind} from {low:g} to {high:g}"
