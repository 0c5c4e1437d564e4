"""A model's defaults: its checkpoint's or bundle's, and over them what an operator chose."""

from __future__ import annotations

import dataclasses

from engines.facts import OWN_DEFAULTS, Defaults, Facts
from engines.samplers import NoiseSchedule, make_schedule


def with_defaults(facts: Facts, chosen: Defaults) -> Facts:
    """These facts, with the defaults that were chosen.

    Timesteps count the steps. Those that a bundle has belong to its sampler and number of steps:
    another choice of either leaves them out.

    Raises:
        InvalidInput: the model's sampler cannot draw so many steps, or at these timesteps.
    """
    if chosen == OWN_DEFAULTS:
        return facts
    guidance_scale, timesteps = chosen.guidance_scale, chosen.timesteps
    sampler = chosen.sampler or facts.default_sampler
    num_steps = chosen.num_steps or len(timesteps or ()) or facts.default_num_steps
    if (sampler, num_steps) == (facts.default_sampler, facts.default_num_steps):
        timesteps = timesteps or facts.default_timesteps
    make_schedule(
        NoiseSchedule.from_config(facts.scheduler), sampler, num_steps, timesteps=timesteps
    )
    return dataclasses.replace(
        facts,
        default_sampler=sampler,
        default_num_steps=num_steps,
        default_guidance_scale=(
            facts.default_guidance_scale if guidance_scale is None else guidance_scale
        ),
        default_timesteps=timesteps,
    )
