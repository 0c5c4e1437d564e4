"""Euler's method over σ (arXiv 2206.00364, algorithm 1 without churn), and its ancestral form."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

from engines.samplers import prediction, sigmas, spacing
from engines.samplers.schedule import (
    SPACINGS,
    TRAINING,
    Options,
    Sampler,
    Schedule,
    Step,
    Wanted,
)


def _levels(options: Options, wanted: Wanted) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and, one longer at least, the σ from and to which steps lead, float32."""
    training, num_steps = sigmas.training_sigmas(options), wanted.num_steps
    timesteps: np.ndarray = spacing.spaced(options, wanted).astype(np.float32)
    if options["interpolation_type"] == "log_linear":
        levels = np.exp(np.linspace(np.log(training[-1]), np.log(training[0]), num_steps + 1))
    else:
        levels = np.interp(timesteps, np.arange(len(training)), training)
    respaced = sigmas.respaced(options, float(levels[0]), float(levels[-1]), num_steps)
    if respaced is not None:
        levels, timesteps = respaced, sigmas.timesteps_of(respaced, training)
    levels = sigmas.ended(options, levels, training)
    if options["timestep_type"] == "continuous" and options["prediction_type"] == "v_prediction":
        timesteps = 0.25 * np.log(levels[:-1])
    return timesteps, levels


def _make(ancestral: bool, options: Options, wanted: Wanted) -> Schedule:
    every, levels = _levels(options, wanted)
    timesteps = spacing.after_strength(every, wanted.strength)
    largest = float(levels.max())
    if options["timestep_spacing"] == "leading":
        largest = math.sqrt(largest**2 + 1)
    levels = levels[len(every) - len(timesteps) :].astype(np.float64)
    steps = []
    for sigma, target in itertools.islice(itertools.pairwise(levels), len(timesteps)):
        scale = 1 / math.sqrt(sigma**2 + 1)
        up = math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2) if ancestral else 0.0
        down = math.sqrt(target**2 - up**2)
        # In σ space x = x0 + σ·ε; the scaled input is the usual sample of ᾱ = 1/(σ²+1).
        u, b = prediction.x0(options["prediction_type"], scale, sigma * scale)
        a = u * scale
        ratio = (down - sigma) / sigma  # next = x + (x - x0) / σ · (σ_down - σ)
        steps.append(Step(scale, a, b, 1 + ratio * (1 - a), -ratio * b, up))
    noised = [(1.0, float(sigma)) for sigma in levels[: len(steps)]]
    return Schedule.of(timesteps, steps, [ancestral] * len(steps), noised, largest)


EULER = Sampler(
    "EulerDiscreteScheduler",
    functools.partial(_make, False),
    spacing.most_spaced,
    defaults=TRAINING
    | sigmas.RESPACED
    | {"interpolation_type": "linear", "timestep_type": "discrete"},
    known=sigmas.KNOWN
    | {
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    },
    stands_in_for=("LMSDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
)
EULER_ANCESTRAL = Sampler(
    "EulerAncestralDiscreteScheduler",
    functools.partial(_make, True),
    spacing.most_spaced,
    defaults=TRAINING | sigmas.SPACED,
    known={"timestep_spacing": SPACINGS, "prediction_type": ("epsilon", "v_prediction")},
    stands_in_for=("KDPM2AncestralDiscreteScheduler",),
    takes_timesteps=False,
)
