"""Latent consistency sampling: a jump to the image at every step, noised again for the next."""

from __future__ import annotations

import math

from engines.samplers import prediction, spacing
from engines.samplers.schedule import OFF, TRAINING, Options, Sampler, Schedule, Step, Wanted

DISTILLED = {  # LCMScheduler's and TCDScheduler's alike
    **TRAINING,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
}


def _make(options: Options, wanted: Wanted) -> Schedule:
    timesteps = spacing.distilled(options, wanted)
    alphas = options.alphas_cumprod
    steps = []
    draws = []
    for index, timestep in enumerate(timesteps):
        alpha = float(alphas[int(timestep)])
        scaled = timestep * options["timestep_scaling"]
        c_skip = 0.25 / (scaled**2 + 0.25)  # σ_data = 0.5 (arXiv 2310.04378, appendix)
        c_out = scaled / math.sqrt(scaled**2 + 0.25)
        u, v = prediction.x0(options["prediction_type"], math.sqrt(alpha), math.sqrt(1 - alpha))
        a, b = c_out * u + c_skip, c_out * v
        last = index == len(timesteps) - 1
        after = 1.0 if last else float(alphas[int(timesteps[index + 1])])
        signal = math.sqrt(after)
        steps.append(Step(1.0, a, b, signal * a, signal * b, math.sqrt(1 - after)))
        draws.append(not last)
    return Schedule.of(timesteps, steps, draws, spacing.levels(alphas, timesteps))


LCM = Sampler(
    "LCMScheduler",
    _make,
    spacing.most_distilled,
    defaults=DISTILLED | {"clip_sample": False, "thresholding": False, "timestep_scaling": 10.0},
    known={"clip_sample": OFF, "thresholding": OFF},
)
