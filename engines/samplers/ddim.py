"""Denoising diffusion implicit models (arXiv 2010.02502), with their η."""

from __future__ import annotations

import math

from engines.samplers import prediction, spacing
from engines.samplers.schedule import (
    OFF,
    SPACINGS,
    TRAINING,
    Options,
    Sampler,
    Schedule,
    Step,
    Wanted,
)


def _make(options: Options, wanted: Wanted) -> Schedule:
    eta = 0.0 if wanted.eta is None else wanted.eta
    every = spacing.spaced(options, wanted).round()
    timesteps = spacing.after_strength(every, wanted.strength)
    stride = options.num_train_timesteps // wanted.num_steps
    alphas = options.alphas_cumprod
    final = 1.0 if options["set_alpha_to_one"] else float(alphas[0])
    steps = []
    for timestep in timesteps:
        before = int(timestep) - stride
        alpha = float(alphas[int(timestep)])
        after = float(alphas[before]) if before >= 0 else final
        variance = (1 - after) / (1 - alpha) * (1 - alpha / after)
        sigma = eta * math.sqrt(max(variance, 0.0))
        levels = math.sqrt(alpha), math.sqrt(1 - alpha)
        a, b = prediction.x0(options["prediction_type"], *levels)
        u, v = prediction.epsilon(options["prediction_type"], *levels)
        signal, direction = math.sqrt(after), math.sqrt(max(1 - after - sigma**2, 0.0))
        p, q = signal * a + direction * u, signal * b + direction * v
        steps.append(Step(1.0, a, b, p, q, sigma))
    noised = spacing.levels(alphas, timesteps)
    return Schedule.of(timesteps, steps, [eta > 0] * len(steps), noised)


DDIM = Sampler(
    "DDIMScheduler",
    _make,
    spacing.most_spaced,
    defaults=TRAINING
    | {
        "clip_sample": True,
        "thresholding": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    },
    known={"clip_sample": OFF, "thresholding": OFF, "timestep_spacing": SPACINGS},
    stands_in_for=(
        "PNDMScheduler",
        "DDPMScheduler",
        "DDIMParallelScheduler",
        "DDPMParallelScheduler",
    ),
    takes_timesteps=False,
)
