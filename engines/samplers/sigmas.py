"""Noise levels σ = √((1-ᾱ)/ᾱ) of Euler's and DPM-Solver's schedules, in diffusers' arithmetic.

Float32 where diffusers has float32: some timesteps are cut to whole numbers, and a bit more or
less is then another timestep.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from engines.samplers.schedule import OFF, SPACINGS, Options

RHO = 7.0  # arXiv 2206.00364, and diffusers' _convert_to_karras
SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}  # defaults of all that step over σ
RESPACED = SPACED | {  # and of those that may space σ itself
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
    "final_sigmas_type": "zero",
}
KNOWN = {
    "timestep_spacing": SPACINGS,
    "use_beta_sigmas": OFF,  # needs scipy, which nothing else here does
    "final_sigmas_type": ("zero", "sigma_min"),
}


def training_sigmas(options: Options) -> np.ndarray:
    """σ of every training timestep, float32 ``[num_train_timesteps]``, ascending."""
    alphas_cumprod = torch.tensor(options.alphas_cumprod)
    if options["rescale_betas_zero_snr"]:
        alphas_cumprod[-1] = 2**-24  # as diffusers has it, for a σ that is finite
    return ((1 - alphas_cumprod) / alphas_cumprod).pow(0.5).numpy()  # numpy's root rounds otherwise


def respaced(
    options: Options, largest: float, smallest: float, num_steps: int
) -> np.ndarray | None:
    """σ float64 ``[num_steps]`` where the options space σ itself, else None."""
    if options["sigma_max"] is not None:
        largest = options["sigma_max"]
    if options["sigma_min"] is not None:
        smallest = options["sigma_min"]
    if options["use_karras_sigmas"]:
        ramp = np.linspace(0, 1, num_steps)
        first, last = largest ** (1 / RHO), smallest ** (1 / RHO)
        return np.asarray((first + ramp * (last - first)) ** RHO)
    if options["use_exponential_sigmas"]:
        return np.exp(np.linspace(math.log(largest), math.log(smallest), num_steps))
    return None


def timesteps_of(sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Fractional timesteps float64, by linear interpolation in log σ (diffusers' _sigma_to_t)."""
    log_training, logs = np.log(training), np.log(np.maximum(sigmas, 1e-10))
    # The last one below: rescaled to zero SNR, the levels of the last few timesteps do not ascend.
    reached = np.cumsum(logs >= log_training[:, None], axis=0)  # [num_train_timesteps, num_steps]
    low = reached.argmax(axis=0).clip(max=len(training) - 2)
    below, above = log_training[low], log_training[low + 1]
    share = np.clip((below - logs) / (below - above), 0, 1)
    return np.asarray((1 - share) * low + share * (low + 1))


def ended(options: Options, sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
    """With the σ that the last step goes to, float32 ``[len(sigmas) + 1]``."""
    last = training[0] if options["final_sigmas_type"] == "sigma_min" else 0.0
    return np.append(sigmas, last).astype(np.float32)
