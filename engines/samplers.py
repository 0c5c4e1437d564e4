"""Samplers as tables of coefficients: seven numbers for every step of a row, made once on the host.

    model_input = i · sample
    denoised    = a · sample + b · model_output
    next_sample = p · sample + q · model_output + r · noise + s · denoised of the step before

Every sampler here is linear in these, so rows with different samplers,
step counts and strengths share one batch. Each table agrees with the diffusers scheduler named in
`_TABLES`; options that are not linear or not known are refused, never ignored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.errors import CheckpointError, InvalidInput

SAMPLERS = ("lcm", "ddim", "euler", "euler_ancestral", "tcd")
# Options of diffusers' schedulers that change the arithmetic in ways a table does not hold.
REFUSED = {
    "clip_sample": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
    "sigma_min": None,
    "sigma_max": None,
}
TCD_DEFAULT_ETA = 0.3  # arXiv 2402.19159, and TCDScheduler.step's own default
Table = list[tuple[float, float, float, float, float, float]]


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """A checkpoint's training schedule and the options of its ``scheduler_config.json``."""

    alphas_cumprod: np.ndarray  # float64 [num_train_timesteps]
    prediction_type: str  # epsilon, v_prediction or sample
    timestep_spacing: str  # leading, trailing or linspace
    steps_offset: int
    final_alpha: float  # ᾱ before the first training step
    timestep_scaling: float  # LCM's s in c_skip and c_out
    original_steps: int  # LCM's and TCD's solver steps at distillation
    strength_drops_steps: bool  # of LCM and TCD; see `from_config`

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, strength_drops_steps: bool = False
    ) -> NoiseSchedule:
        """Read a diffusers ``scheduler_config.json``.

        Image-to-image with LCM and TCD differs between diffusers' pipelines. Stable Diffusion's
        drops the first of ``num_steps`` steps (``strength_drops_steps``), as with every sampler;
        the one of models with a guidance embedding spreads all of them over what strength leaves.

        Raises:
            CheckpointError: an option whose effect these tables do not hold.
        """
        for name, harmless in REFUSED.items():
            if config.get(name, harmless) not in (harmless, None):
                raise CheckpointError(
                    f"scheduler option {name}={config[name]!r} is not supported; set it to "
                    f"{harmless!r} in scheduler/scheduler_config.json if the model allows"
                )
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise CheckpointError(
                f"scheduler prediction_type={prediction!r} is not supported; known are epsilon, "
                "v_prediction and sample"
            )
        spacing = config.get("timestep_spacing", "leading")
        if spacing not in ("leading", "trailing", "linspace"):
            raise CheckpointError(f"scheduler timestep_spacing={spacing!r} is not supported")
        alphas = np.cumprod(1.0 - _betas(config).astype(np.float32)).astype(np.float64)
        return cls(
            alphas_cumprod=alphas,
            prediction_type=prediction,
            timestep_spacing=spacing,
            steps_offset=int(config.get("steps_offset", 0)),
            final_alpha=1.0 if config.get("set_alpha_to_one", True) else float(alphas[0]),
            timestep_scaling=float(config.get("timestep_scaling", 10.0)),
            original_steps=int(config.get("original_inference_steps", 50)),
            strength_drops_steps=strength_drops_steps,
        )

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One row's way from noise to image.

    ``coefficients`` float32 ``[num_steps, 7]`` in the order i, a, b, p, q, r, s; ``timesteps``
    float32 ``[num_steps]`` (fractional with linspace spacing); ``draws_noise`` bool ``[num_steps]``
    says where diffusers draws from the generator. The first sample is
    ``sample_scale · image_latents + noise_scale · noise``.
    """

    timesteps: np.ndarray
    coefficients: np.ndarray
    draws_noise: np.ndarray
    sample_scale: float
    noise_scale: float

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def make_schedule(
    noise: NoiseSchedule,
    sampler: str,
    num_steps: int,
    *,
    strength: float = 1.0,
    image_to_image: bool = False,
    eta: float | None = None,
) -> Schedule:
    """The table of one row. ``strength`` < 1 starts an image-to-image row part of the way down.

    Raises:
        InvalidInput: unknown sampler, or a step count that this schedule cannot give.
    """
    if sampler not in SAMPLERS:
        raise InvalidInput(
            "sampler", sampler, f"sampler is {sampler!r}; known are {', '.join(SAMPLERS)}"
        )
    if not 0.0 < strength <= 1.0:
        raise InvalidInput(
            "strength", strength, f"strength is {strength:g}; it must be above 0 and at most 1"
        )
    if eta is not None and not 0.0 <= eta <= 1.0:
        raise InvalidInput("eta", eta, f"eta is {eta:g}; it must be from 0 to 1")
    limit = noise.num_train_timesteps - noise.steps_offset
    if sampler in ("lcm", "tcd"):
        spread = 1.0 if noise.strength_drops_steps else strength
        limit = math.floor(noise.original_steps * spread)
    if not 1 <= num_steps <= limit:
        raise InvalidInput(
            "num_steps",
            num_steps,
            f"num_inference_steps is {num_steps}; the {sampler} sampler takes 1 to {limit} at "
            f"strength {strength:g}",
        )
    return _TABLES[sampler](noise, num_steps, strength, image_to_image, eta)


# -- timesteps ---------------------------------------------------------------------------------


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    count = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return np.linspace(start, end, count)
    if kind == "scaled_linear":
        return np.square(np.linspace(start**0.5, end**0.5, count))
    if kind == "squaredcos_cap_v2":  # diffusers' betas_for_alpha_bar with the cosine
        steps = np.arange(count + 1) / count
        bar = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.asarray(np.minimum(1 - bar[1:] / bar[:-1], 0.999), np.float64)
    raise CheckpointError(f"scheduler beta_schedule={kind!r} is not supported")


def _spaced(noise: NoiseSchedule, num_steps: int, *, fractional: bool) -> np.ndarray:
    """Descending timesteps as the DDIM and Euler schedulers space them."""
    train = noise.num_train_timesteps
    if noise.timestep_spacing == "linspace":
        steps = np.linspace(0, train - 1, num_steps)[::-1]
        return steps.astype(np.float32) if fractional else steps.round()
    if noise.timestep_spacing == "leading":
        return (np.arange(num_steps) * (train // num_steps))[::-1] + float(noise.steps_offset)
    return np.round(np.arange(train, 0, -train / num_steps)) - 1.0


def _distilled(noise: NoiseSchedule, num_steps: int, strength: float) -> np.ndarray:
    """Descending timesteps of LCM and TCD: every k-th of the solver's own steps."""
    k = noise.num_train_timesteps // noise.original_steps
    spread = 1.0 if noise.strength_drops_steps else strength
    origin = np.arange(1, int(noise.original_steps * spread) + 1) * k - 1
    indices = np.floor(np.linspace(0, len(origin), num=num_steps, endpoint=False)).astype(int)
    steps = np.asarray(origin[::-1][indices], np.float64)
    return _after_strength(steps, strength) if noise.strength_drops_steps else steps


def _after_strength(steps: np.ndarray, strength: float) -> np.ndarray:
    """What diffusers' img2img ``get_timesteps`` leaves of a schedule."""
    kept = min(int(len(steps) * strength), len(steps))
    if kept < 1:
        raise InvalidInput(
            "strength",
            strength,
            f"strength is {strength:g} with {len(steps)} steps, which leaves no step; raise "
            f"strength to {1 / len(steps):.3g} or more, or num_inference_steps",
        )
    return steps[len(steps) - kept :]


# -- tables ------------------------------------------------------------------------------------


def _x0(noise: NoiseSchedule, alpha: float) -> tuple[float, float]:
    """(u, v) with x0 = u · sample + v · model_output, for sample = √ᾱ·x0 + √(1-ᾱ)·ε."""
    signal, sigma = math.sqrt(alpha), math.sqrt(1 - alpha)
    if noise.prediction_type == "epsilon":
        return 1 / signal, -sigma / signal
    if noise.prediction_type == "v_prediction":
        return signal, -sigma
    return 0.0, 1.0


def _eps(noise: NoiseSchedule, alpha: float) -> tuple[float, float]:
    """(u, v) with ε = u · sample + v · model_output."""
    signal, sigma = math.sqrt(alpha), math.sqrt(1 - alpha)
    if noise.prediction_type == "epsilon":
        return 0.0, 1.0
    if noise.prediction_type == "v_prediction":
        return sigma, signal
    return 1 / sigma, -signal / sigma


def _schedule(
    steps: np.ndarray, rows: Table, draws: list[bool], start: tuple[float, float]
) -> Schedule:
    return Schedule(
        timesteps=np.asarray(steps, np.float32),
        coefficients=np.pad(np.asarray(rows, np.float32).reshape(-1, 6), ((0, 0), (0, 1))),
        draws_noise=np.asarray(draws, bool),
        sample_scale=start[0],
        noise_scale=start[1],
    )


def _start(noise: NoiseSchedule, first: float, image_to_image: bool) -> tuple[float, float]:
    """Text-to-image starts from pure noise; image-to-image from the noised input."""
    if not image_to_image:
        return 0.0, 1.0
    alpha = noise.alphas_cumprod[int(first)]
    return math.sqrt(alpha), math.sqrt(1 - alpha)


def _lcm(
    noise: NoiseSchedule, num_steps: int, strength: float, img2img: bool, _: float | None
) -> Schedule:
    steps = _distilled(noise, num_steps, strength)
    rows: Table = []
    draws = []
    for index, step in enumerate(steps):
        alpha = noise.alphas_cumprod[int(step)]
        scaled = step * noise.timestep_scaling
        c_skip = 0.25 / (scaled**2 + 0.25)  # σ_data = 0.5 (arXiv 2310.04378, appendix)
        c_out = scaled / math.sqrt(scaled**2 + 0.25)
        u, v = _x0(noise, alpha)
        a, b = c_out * u + c_skip, c_out * v
        last = index == len(steps) - 1
        after = 1.0 if last else noise.alphas_cumprod[int(steps[index + 1])]
        signal = math.sqrt(after)
        rows.append((1.0, a, b, signal * a, signal * b, math.sqrt(1 - after)))
        draws.append(not last)
    return _schedule(steps, rows, draws, _start(noise, steps[0], img2img))


def _ddim(
    noise: NoiseSchedule, num_steps: int, strength: float, img2img: bool, eta: float | None
) -> Schedule:
    eta = 0.0 if eta is None else eta
    steps = _after_strength(_spaced(noise, num_steps, fractional=False), strength)
    stride = noise.num_train_timesteps // num_steps
    rows: Table = []
    for step in steps:
        before = int(step) - stride
        alpha = noise.alphas_cumprod[int(step)]
        after = noise.alphas_cumprod[before] if before >= 0 else noise.final_alpha
        variance = (1 - after) / (1 - alpha) * (1 - alpha / after)
        sigma = eta * math.sqrt(max(variance, 0.0))
        a, b = _x0(noise, alpha)
        u, v = _eps(noise, alpha)
        signal, direction = math.sqrt(after), math.sqrt(max(1 - after - sigma**2, 0.0))
        rows.append((1.0, a, b, signal * a + direction * u, signal * b + direction * v, sigma))
    return _schedule(steps, rows, [eta > 0] * len(rows), _start(noise, steps[0], img2img))


def _sigmas(noise: NoiseSchedule, steps: np.ndarray) -> np.ndarray:
    """Euler's σ = √((1-ᾱ)/ᾱ) at (fractional) timesteps, with the final 0."""
    table = np.sqrt((1 - noise.alphas_cumprod) / noise.alphas_cumprod)
    return np.append(np.interp(steps, np.arange(len(table)), table), 0.0)


def _euler_like(ancestral: bool) -> Callable[..., Schedule]:
    def make(
        noise: NoiseSchedule, num_steps: int, strength: float, img2img: bool, _: float | None
    ) -> Schedule:
        every = _spaced(noise, num_steps, fractional=True)
        steps = _after_strength(every, strength)
        sigmas = _sigmas(noise, every)
        first = (sigmas.max() ** 2 + 1) ** 0.5
        if noise.timestep_spacing in ("linspace", "trailing"):
            first = sigmas.max()
        sigmas = sigmas[len(every) - len(steps) :]
        rows: Table = []
        for sigma, target in itertools.pairwise(sigmas):
            scale = 1 / math.sqrt(sigma**2 + 1)
            up = math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2) if ancestral else 0.0
            down = math.sqrt(target**2 - up**2)
            # In σ space x = x0 + σ·ε; the scaled input is the usual sample of ᾱ = 1/(σ²+1).
            if noise.prediction_type == "epsilon":
                a, b = 1.0, -sigma
            elif noise.prediction_type == "v_prediction":
                a, b = scale**2, -sigma * scale
            else:
                a, b = 0.0, 1.0
            ratio = (down - sigma) / sigma  # next = x + (x - x0) / σ · (σ_down - σ)
            rows.append((scale, a, b, 1 + ratio * (1 - a), -ratio * b, up))
        start = (1.0, float(sigmas[0])) if img2img else (0.0, float(first))
        return _schedule(steps, rows, [ancestral] * len(rows), start)

    return make


def _tcd(
    noise: NoiseSchedule, num_steps: int, strength: float, img2img: bool, eta: float | None
) -> Schedule:
    eta = TCD_DEFAULT_ETA if eta is None else eta
    steps = _distilled(noise, num_steps, strength)
    rows: Table = []
    draws = []
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        target = 0.0 if last else steps[index + 1]
        inner = noise.alphas_cumprod[math.floor((1 - eta) * target)]
        alpha = noise.alphas_cumprod[int(step)]
        after = noise.final_alpha if last else noise.alphas_cumprod[int(target)]
        a, b = _x0(noise, alpha)
        u, v = _eps(noise, alpha)
        signal, sigma = math.sqrt(inner), math.sqrt(1 - inner)
        p, q, r = signal * a + sigma * u, signal * b + sigma * v, 0.0
        if eta > 0 and not last:
            ratio = math.sqrt(after / inner)
            p, q, r = ratio * p, ratio * q, math.sqrt(max(1 - after / inner, 0.0))
        rows.append((1.0, a, b, p, q, r))
        draws.append(eta > 0 and not last)
    return _schedule(steps, rows, draws, _start(noise, steps[0], img2img))


_TABLES: dict[str, Callable[..., Schedule]] = {
    "lcm": _lcm,  # LCMScheduler
    "ddim": _ddim,  # DDIMScheduler
    "euler": _euler_like(ancestral=False),  # EulerDiscreteScheduler
    "euler_ancestral": _euler_like(ancestral=True),  # EulerAncestralDiscreteScheduler
    "tcd": _tcd,  # TCDScheduler
}
