"""Trajectory consistency sampling (arXiv 2402.19159): past the next step, then noised up to it."""

from __future__ import annotations

import math

import numpy as np

from engines.samplers import prediction, spacing
from engines.samplers.lcm import DISTILLED
from engines.samplers.schedule import Options, Sampler, Schedule, Step, Wanted

DEFAULT_ETA = 0.3  # the paper's γ, and TCDScheduler.step's own default


def _make(options: Options, wanted: Wanted) -> Schedule:
    eta = DEFAULT_ETA if wanted.eta is None else wanted.eta
    timesteps = spacing.distilled(options, wanted)
    alphas = options.alphas_cumprod
    steps = []
    draws = []
    for index, timestep in enumerate(timesteps):
        last = index == len(timesteps) - 1
        target = 0.0 if last else timesteps[index + 1]
        share = np.float32(1 - eta)  # diffusers' arithmetic: a bit more is another timestep
        inner = float(alphas[math.floor(share * np.float32(target))])
        alpha = float(alphas[int(timestep)])
        levels = math.sqrt(alpha), math.sqrt(1 - alpha)
        a, b = prediction.x0(options["prediction_type"], *levels)
        u, v = prediction.epsilon(options["prediction_type"], *levels)
        signal, sigma = math.sqrt(inner), math.sqrt(1 - inner)
        p, q, r = signal * a + sigma * u, signal * b + sigma * v, 0.0
        if eta > 0 and not last:
            ratio = float(alphas[int(target)]) / inner
            p, q, r = math.sqrt(ratio) * p, math.sqrt(ratio) * q, math.sqrt(max(1 - ratio, 0.0))
        steps.append(Step(1.0, a, b, p, q, r))
        draws.append(eta > 0 and not last)
    return Schedule.of(timesteps, steps, draws, spacing.levels(alphas, timesteps))


TCD = Sampler(
    "TCDScheduler",
    _make,
    spacing.most_distilled,
    defaults=DISTILLED,
    stands_in_for=("LCMScheduler",),  # where it clips
)
