"""DPM-Solver++ in its multistep form of order 1 and 2 (arXiv 2211.01095), and as an SDE."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from engines.samplers import prediction, sigmas, spacing
from engines.samplers.schedule import (
    OFF,
    TRAINING,
    Options,
    Sampler,
    Schedule,
    Step,
    Wanted,
)

SDE = "sde-dpmsolver++"
FEW_STEPS = 15  # below it diffusers' lower_order_final counts


def _timesteps(options: Options, wanted: Wanted) -> np.ndarray:
    """Descending timesteps float64, whole numbers: spaced as of one step more, down to the last."""
    if wanted.timesteps is not None:
        return np.asarray(wanted.timesteps, np.float64)
    num_steps = wanted.num_steps
    train, spaced = options.num_train_timesteps, options["timestep_spacing"]
    last = train
    if options["lambda_min_clipped"] > -math.inf:
        lambdas = -np.log(sigmas.training_sigmas(options))[::-1]
        last -= int(np.searchsorted(lambdas, options["lambda_min_clipped"]))
    if spaced == "linspace":
        return np.linspace(0, last - 1, num_steps + 1).round()[::-1][:-1]
    if spaced == "leading":
        steps = np.arange(num_steps + 1) * (last // (num_steps + 1))
        return steps[::-1][:-1] + float(options["steps_offset"])
    return np.arange(last, 0, -train / num_steps).round() - 1.0


def _levels(options: Options, wanted: Wanted) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps, and the σ from and to which steps lead, float32 and one longer."""
    training, num_steps = sigmas.training_sigmas(options), wanted.num_steps
    levels = sigmas.respaced(options, float(training[-1]), float(training[0]), num_steps)
    rounded = options["use_karras_sigmas"]
    if not rounded and options["use_lu_lambdas"]:  # before exponential ones, in diffusers too
        logs = np.log(training)
        levels, rounded = np.exp(np.linspace(float(logs[-1]), float(logs[0]), num_steps)), True
    if levels is None:
        timesteps = _timesteps(options, wanted)
        levels = np.interp(timesteps, np.arange(len(training)), training)
    else:
        timesteps = sigmas.timesteps_of(levels, training)
        if rounded and options["beta_schedule"] != "squaredcos_cap_v2":
            timesteps = timesteps.round()
    return np.trunc(timesteps), sigmas.ended(options, levels, training)


def _make(options: Options, wanted: Wanted) -> Schedule:
    noisy = options["algorithm_type"] == SDE
    every, levels = _levels(options, wanted)
    timesteps = spacing.after_strength(every, wanted.strength)
    first = len(every) - len(timesteps)
    few = options["lower_order_final"] and len(every) < FEW_STEPS
    euler_at_last = few or options["euler_at_final"] or options["final_sigmas_type"] == "zero"
    steps = []
    for index in range(first, len(every)):
        sigma, target = float(levels[index]), float(levels[index + 1])
        signal, after = 1 / math.hypot(1, sigma), 1 / math.hypot(1, target)
        a, b = prediction.x0(options["prediction_type"], signal, sigma * signal)
        h = math.log(sigma / target) if target else math.inf  # λ_t - λ_s, with λ = -log σ
        shrunk, grown = _integrals(h, noisy=noisy, heun=options["solver_type"] == "heun")
        weight, back = after * shrunk, 0.0  # of x0 as seen here, and as seen a step before
        last = index == len(every) - 1
        if options["solver_order"] > 1 and index > first and not (last and euler_at_last):
            ratio = h / math.log(float(levels[index - 1]) / sigma)
            back = -after * grown * ratio
            weight -= back
        decay = math.exp(-h) if noisy else 1.0
        r = target * after * math.sqrt(max(-math.expm1(-2 * h), 0.0)) if noisy else 0.0
        kept = target * after / (sigma * signal) * decay
        steps.append(Step(1.0, a, b, kept + weight * a, weight * b, r, back))
    sigmas_before = [float(sigma) for sigma in levels[first : len(every)]]
    noised = [(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)) for sigma in sigmas_before]
    return Schedule.of(timesteps, steps, [noisy] * len(steps), noised)


def _integrals(h: float, *, noisy: bool, heun: bool) -> tuple[float, float]:
    """The weights of x0 and of its slope over a step of h in λ, by α of its end."""
    rate = 2 * h if noisy else h
    weight = -math.expm1(-rate)
    if not heun:
        return weight, weight / 2
    if h == 0:
        return weight, 0.0
    return weight, 1 - weight / rate


# sigma_min and sigma_max are not the class's own, but it reads them where a config has them.
DPMPP = (
    TRAINING
    | sigmas.RESPACED
    | {
        "solver_order": 2,
        "solver_type": "midpoint",
        "algorithm_type": "dpmsolver++",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "lambda_min_clipped": -math.inf,
        "thresholding": False,
        "variance_type": None,
    }
)
KNOWN = sigmas.KNOWN | {
    "solver_order": (1, 2),
    # The last three are other classes', which DPMSolverMultistepScheduler takes for midpoint.
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "use_flow_sigmas": OFF,
    "thresholding": OFF,
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}


def _most_steps(options: Options, wanted: Wanted) -> int:
    return spacing.most_spaced(options, wanted) - 1


DPMPP_2M = Sampler(
    "DPMSolverMultistepScheduler",
    _make,
    _most_steps,
    defaults=DPMPP,
    known=KNOWN,
    fixed={"algorithm_type": "dpmsolver++"},
    stands_in_for=(
        "DPMSolverMultistepScheduler",  # with another algorithm_type
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "SASolverScheduler",
    ),
)
DPMPP_2M_SDE = dataclasses.replace(
    DPMPP_2M, fixed={"algorithm_type": SDE}, stands_in_for=("DPMSolverSDEScheduler",)
)
