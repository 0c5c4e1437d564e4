"""Which timesteps a row visits: spread over the training's, or a share of a distillation's."""

from __future__ import annotations

import math

import numpy as np

from engines.errors import InvalidInput
from engines.samplers.schedule import Options, Wanted


def spaced(options: Options, wanted: Wanted) -> np.ndarray:
    """Descending timesteps float64 ``[num_steps]`` as DDIM and Euler space them, not rounded."""
    if wanted.timesteps is not None:
        return np.asarray(wanted.timesteps, np.float64)
    train, num_steps = options.num_train_timesteps, wanted.num_steps
    if options["timestep_spacing"] == "linspace":
        return np.linspace(0, train - 1, num_steps)[::-1]
    if options["timestep_spacing"] == "leading":
        return (np.arange(num_steps) * (train // num_steps))[::-1] + float(options["steps_offset"])
    return np.round(np.arange(train, 0, -train / num_steps)) - 1.0


def most_spaced(options: Options, _: Wanted) -> int:
    """The most steps that leading spacing can give."""
    return options.num_train_timesteps - int(options["steps_offset"])


def distilled(options: Options, wanted: Wanted) -> np.ndarray:
    """Descending timesteps of LCM and TCD: every k-th of the solver's own steps."""
    if wanted.timesteps is not None:
        return after_strength(np.asarray(wanted.timesteps, np.float64), wanted.strength)
    original = int(options["original_inference_steps"])
    k = options.num_train_timesteps // original
    origin = np.arange(1, int(original * _spread(wanted)) + 1) * k - 1
    indices = np.floor(np.linspace(0, len(origin), num=wanted.num_steps, endpoint=False))
    steps = np.asarray(origin[::-1][indices.astype(int)], np.float64)
    return after_strength(steps, wanted.strength) if wanted.strength_drops_steps else steps


def most_distilled(options: Options, wanted: Wanted) -> int:
    """As many as the solver had at distillation, of those that strength leaves."""
    return math.floor(int(options["original_inference_steps"]) * _spread(wanted))


def _spread(wanted: Wanted) -> float:
    return 1.0 if wanted.strength_drops_steps else wanted.strength


def after_strength(steps: np.ndarray, strength: float) -> np.ndarray:
    """What diffusers' img2img ``get_timesteps`` leaves of a schedule.

    Raises:
        InvalidInput: nothing.
    """
    kept = min(int(len(steps) * strength), len(steps))
    if kept < 1:
        raise InvalidInput(
            "strength",
            strength,
            f"strength is {strength:g} with {len(steps)} steps, which leaves no step; raise "
            f"strength to {1 / len(steps):.3g} or more, or num_inference_steps",
        )
    return steps[len(steps) - kept :]


def levels(alphas_cumprod: np.ndarray, timesteps: np.ndarray) -> list[tuple[float, float]]:
    """√ᾱ and √(1-ᾱ) at each timestep: diffusers' ``add_noise``."""
    alphas = [float(alphas_cumprod[int(timestep)]) for timestep in timesteps]
    return [(math.sqrt(alpha), math.sqrt(1 - alpha)) for alpha in alphas]
