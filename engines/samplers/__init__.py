"""Samplers as tables of coefficients: seven numbers for every step of a row, made once on the host.

    model_input = i · sample
    denoised    = a · sample + b · model_output
    next_sample = p · sample + q · model_output + r · noise + s · denoised of the step before

Every sampler here is linear in these, so rows with different samplers, step counts and strengths
share one batch. Each table agrees with the diffusers scheduler that its `Sampler` names; where a
checkpoint's options are not linear or not known, the samplers that have them are refused, and
only these.
"""

from __future__ import annotations

from typing import Any

from engines.errors import InvalidInput
from engines.samplers import named
from engines.samplers.ddim import DDIM
from engines.samplers.dpmpp import DPMPP_2M, DPMPP_2M_SDE
from engines.samplers.euler import EULER, EULER_ANCESTRAL
from engines.samplers.lcm import LCM
from engines.samplers.schedule import NoiseSchedule, Sampler, Schedule, Wanted, given_options
from engines.samplers.tcd import TCD

__all__ = [
    "SAMPLERS",
    "NoiseSchedule",
    "Schedule",
    "default_sampler",
    "given_options",
    "make_schedule",
    "option_values",
    "samplers_of",
]

_BY_NAME = {
    "lcm": LCM,
    "ddim": DDIM,
    "euler": EULER,
    "euler_ancestral": EULER_ANCESTRAL,
    "tcd": TCD,
    "dpmpp_2m": DPMPP_2M,
    "dpmpp_2m_sde": DPMPP_2M_SDE,
}
SAMPLERS = tuple(_BY_NAME)


def samplers_of(noise: NoiseSchedule) -> tuple[str, ...]:
    """The samplers that hold all of a checkpoint's options."""
    return tuple(name for name, each in _BY_NAME.items() if noise.refusal(each) is None)


def option_values() -> dict[str, tuple[Any, ...]]:
    """Scheduler options that a sampler reads → the values that samplers name, defaults first."""
    found: dict[str, tuple[Any, ...]] = {}
    for sampler in _BY_NAME.values():
        for name, default in sampler.defaults.items():
            fixed = (sampler.fixed[name],) if name in sampler.fixed else ()
            named = (default, *fixed, *sampler.known.get(name, ()))
            found[name] = tuple(dict.fromkeys((*found.get(name, ()), *named)))
    return found


def default_sampler(noise: NoiseSchedule) -> tuple[str, bool]:
    """The sampler of the checkpoint's own scheduler class, and whether it only stands in for it.

    DDIM stands in for classes nobody here knows: it needs no more than the training schedule.
    """
    named = noise.given.get("_class_name")
    usable = samplers_of(noise)
    for name in usable:
        if _is_own(noise, _BY_NAME[name]):
            return name, False
    stand_ins = [name for name in usable if named in _BY_NAME[name].stands_in_for]
    return next(name for name in (*stand_ins, "ddim", "euler", *usable) if name in usable), True


def _is_own(noise: NoiseSchedule, sampler: Sampler) -> bool:
    given = {**sampler.defaults, **noise.given}
    return given.get("_class_name") == sampler.scheduler and all(
        given[name] == value for name, value in sampler.fixed.items()
    )


def make_schedule(
    noise: NoiseSchedule,
    sampler: str,
    num_steps: int,
    *,
    strength: float = 1.0,
    strength_drops_steps: bool = True,
    eta: float | None = None,
    timesteps: tuple[int, ...] | None = None,
) -> Schedule:
    """The table of one row, see `Wanted`.

    ``timesteps`` are where to draw, as with diffusers' ``set_timesteps(timesteps=...)``.

    Raises:
        InvalidInput: unknown sampler, one that does not hold the checkpoint's options, a step
            count that this schedule cannot give, or timesteps that it cannot draw at.
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
    chosen = _BY_NAME[sampler]
    refusal = noise.refusal(chosen)
    if refusal is not None:
        raise InvalidInput(
            "sampler",
            sampler,
            f"sampler is {sampler!r}, which does not support the checkpoint's scheduler option "
            f"{refusal}; use {', '.join(samplers_of(noise))}",
        )
    options = noise.options(chosen)
    wanted = Wanted(num_steps, strength, strength_drops_steps, eta, timesteps)
    if timesteps is not None:
        _check_takes_timesteps(noise, sampler, timesteps)
        named.check(timesteps, num_steps, options.num_train_timesteps)
        return chosen.make(options, wanted)
    limit = chosen.most_steps(options, wanted)
    if not 1 <= num_steps <= limit:
        raise InvalidInput(
            "num_steps",
            num_steps,
            f"num_inference_steps is {num_steps}; the {sampler} sampler takes 1 to {limit} at "
            f"strength {strength:g}",
        )
    return chosen.make(options, wanted)


def _check_takes_timesteps(noise: NoiseSchedule, sampler: str, timesteps: tuple[int, ...]) -> None:
    refusal = named.refusal(noise, _BY_NAME[sampler])
    if refusal is None:
        return
    others = [name for name in samplers_of(noise) if named.refusal(noise, _BY_NAME[name]) is None]
    raise InvalidInput(
        "timesteps",
        timesteps,
        f"timesteps is {named.shown(timesteps)} and the sampler {sampler} {refusal}; leave "
        f"timesteps out or use {', '.join(others)}",
    )
