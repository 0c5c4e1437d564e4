"""What samplers start from and what they make: a checkpoint's scheduler options, a row's schedule.

A ``scheduler_config.json`` says only part of what a scheduler needs. For the rest every class of
diffusers has defaults of its own, and these differ: so options are completed for one sampler at a
time. Knows no sampler; those are the modules beside this one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engines.errors import CheckpointError

SPACINGS = ("leading", "trailing", "linspace")
OFF = (False, None)  # of a switch
TRAINING = {  # that all classes have
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Trained on another noise process than sample = √ᾱ·x0 + √(1-ᾱ)·ε, so that nothing can stand in.
OTHER_PROCESSES = (
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CosineDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)


class Wanted(NamedTuple):
    """What a row asks of its sampler. ``strength`` below 1 starts part of the way down.

    Where it does with LCM and TCD differs between diffusers' pipelines. Stable Diffusion's, and all
    that inpaint, drop the first of ``num_steps`` steps (``strength_drops_steps``), as with every
    sampler; the one of models with a guidance embedding spreads all of them over what is left.
    ``timesteps``, where it names them, are descending and ``num_steps`` long.
    """

    num_steps: int
    strength: float
    strength_drops_steps: bool
    eta: float | None
    timesteps: tuple[int, ...] | None = None


class Step(NamedTuple):
    """The seven coefficients of a step, see `engines.samplers`."""

    i: float
    a: float
    b: float
    p: float
    q: float
    r: float = 0.0
    s: float = 0.0


@dataclass(frozen=True, slots=True)
class Options:
    """Scheduler options as one sampler's diffusers class would have them."""

    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """None where the class has no such option."""
        return self.values.get(name)

    @property
    def num_train_timesteps(self) -> int:
        return int(self["num_train_timesteps"])

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ float32 ``[num_train_timesteps]``, to the last bit as diffusers has it."""
        trained = self["trained_betas"]
        return _alphas_cumprod(
            self.num_train_timesteps,
            float(self["beta_start"]),
            float(self["beta_end"]),
            self["beta_schedule"],
            None if trained is None else tuple(trained),
            bool(self["rescale_betas_zero_snr"]),
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """One row's way from noise to image.

    ``coefficients`` float32 ``[num_steps, 7]`` in the order i, a, b, p, q, r, s; ``timesteps``
    float32 ``[num_steps]`` (fractional with linspace spacing); ``draws_noise`` bool ``[num_steps]``
    says where diffusers draws from the generator.

    ``levels`` float32 ``[num_steps + 1, 2]`` are the shares of an image's latents and of noise in
    the sample before each step, and after the last. Image-to-image starts from the first of them,
    text-to-image from ``init_noise · noise``.
    """

    timesteps: np.ndarray
    coefficients: np.ndarray
    draws_noise: np.ndarray
    levels: np.ndarray
    init_noise: float

    @classmethod
    def of(
        cls,
        timesteps: np.ndarray,
        steps: Sequence[Step],
        draws_noise: Sequence[bool],
        levels: Sequence[tuple[float, float]],
        init_noise: float = 1.0,
    ) -> Schedule:
        """``levels`` before each step; after the last there is no noise."""
        return cls(
            timesteps=np.asarray(timesteps, np.float32),
            coefficients=np.asarray(steps, np.float32),
            draws_noise=np.asarray(draws_noise, bool),
            levels=np.asarray([*levels, (1.0, 0.0)], np.float32),
            init_noise=init_noise,
        )

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True, slots=True)
class Sampler:
    """A rule that turns model outputs into the next sample; agrees with ``scheduler`` of diffusers.

    ``defaults`` are that class's; ``fixed`` are options that choosing the sampler settles,
    whatever a config says; ``known`` are the values of an option that a table can hold: with
    others the sampler is refused. ``most_steps`` bounds a row's ``num_steps``. Rows may name their
    timesteps where the class's ``set_timesteps`` takes them.
    """

    scheduler: str
    make: Callable[[Options, Wanted], Schedule]
    most_steps: Callable[[Options, Wanted], int]
    defaults: Mapping[str, Any]
    known: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    stands_in_for: tuple[str, ...] = ()  # classes whose rule is no table
    takes_timesteps: bool = True


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """What a checkpoint's ``scheduler_config.json`` gives."""

    given: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers ``scheduler_config.json``, or what `given_options` finds.

        Raises:
            CheckpointError: no sampler can draw with these options.
        """
        given = dict(config)
        if given.get("_class_name") in OTHER_PROCESSES:
            raise CheckpointError(
                f"the checkpoint's scheduler is {given['_class_name']}: such models are trained on "
                "another noise process than Stable Diffusion's, which no sampler here draws"
            )
        known = {"prediction_type": PREDICTIONS}
        if given.get("trained_betas") is None:
            known["beta_schedule"] = BETA_SCHEDULES
        for name, values in known.items():
            if given.get(name, values[0]) not in values:
                raise CheckpointError(
                    f"scheduler option {name}={given[name]!r} is not supported; known are "
                    f"{', '.join(values)}"
                )
        betas = given.get("trained_betas")
        count = given.get("num_train_timesteps", TRAINING["num_train_timesteps"])
        if betas is not None and len(betas) != count:
            raise CheckpointError(
                f"scheduler option trained_betas has {len(betas)} values; it needs as many as "
                f"num_train_timesteps says, {count}"
            )
        return cls(given)

    def options(self, sampler: Sampler) -> Options:
        """What is given, completed as diffusers' ``from_config`` would for this sampler."""
        given = {name: self.given[name] for name in sampler.defaults.keys() & self.given.keys()}
        return Options({**sampler.defaults, **given, **sampler.fixed})

    def refusal(self, sampler: Sampler) -> str | None:
        """The option, as ``name=value``, that the sampler's tables do not hold."""
        options = self.options(sampler)
        for name, values in sampler.known.items():
            if options[name] not in values:
                return f"{name}={options[name]!r}"
        return None


def given_options(scheduler: Any) -> dict[str, Any]:
    """A diffusers scheduler's options as its file gave them: without those it filled in itself."""
    filled_in = scheduler.config.get("_use_default_values", ())
    given = {
        name: value
        for name, value in scheduler.config.items()
        if name[0] != "_" and name not in filled_in
    }
    named = scheduler.config.get("_class_name", type(scheduler).__name__)
    return {"_class_name": named, **given}


@functools.lru_cache(maxsize=16)
def _alphas_cumprod(
    count: int, start: float, end: float, kind: str, trained: tuple[float, ...] | None, zero: bool
) -> np.ndarray:
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    else:  # diffusers' betas_for_alpha_bar with the cosine
        bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = torch.tensor(np.minimum(1 - bar[1:] / bar[:-1], 0.999), dtype=torch.float32)
    if zero:
        betas = _rescaled_to_zero_snr(betas)
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0).numpy()
    alphas_cumprod.flags.writeable = False  # shared
    return alphas_cumprod


def _rescaled_to_zero_snr(betas: Tensor) -> Tensor:
    """arXiv 2305.08891, algorithm 1; diffusers' rescale_zero_terminal_snr."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    bars = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])
