"""A model's defaults: its checkpoint's or bundle's, and over them what an operator chose."""

from __future__ import annotations

import dataclasses

from engines.errors import InvalidInput
from engines.facts import OWN_DEFAULTS, Defaults, Facts
from engines.samplers import NoiseSchedule, make_schedule


def with_defaults(facts: Facts, chosen: Defaults) -> Facts:
    """These facts, with the defaults that were chosen.

    Timesteps count the steps. Those that a bundle has belong to its sampler and number of steps:
    another choice of either leaves them out.

    Raises:
        InvalidInput: the model's sampler cannot draw so many steps, or at these timesteps; or the
            model has no such decoder.
    """
    if chosen == OWN_DEFAULTS:
        return facts
    decoder = chosen.decoder or facts.default_decoder
    check_decoder(decoder, facts)
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
        default_decoder=decoder,
    )


def check_decoder(name: str, facts: Facts) -> None:
    """Raise InvalidInput where the model has no decoder of that name."""
    if name not in facts.decoders:
        known = ", ".join(facts.decoders)
        way_out = "" if "tiny" in facts.decoders else "; --tiny-vae gives it a tiny one"
        raise InvalidInput(
            "decoder", name, f"decoder is {name!r}; {facts.name} is loaded with {known}{way_out}"
        )
