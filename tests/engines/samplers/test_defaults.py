"""What an operator chose over what a model has, and which choices no row could be drawn with."""

from __future__ import annotations

import dataclasses

import pytest

from engines.errors import InvalidInput
from engines.facts import Defaults, Facts
from engines.samplers.defaults import with_defaults

OWN = Facts(
    name="tiny", family="stable-diffusion", latent_channels=4, vae_scale_factor=8,
    default_size_px=64, size_multiple_px=8, min_size_px=32, max_size_px=128, windows=(),
    time_cond_dim=0, default_sampler="ddim", default_num_steps=25, default_guidance_scale=7.5,
    scheduler={"beta_schedule": "scaled_linear", "clip_sample": False},
)  # fmt: skip
PINNED = with_defaults(OWN, Defaults("lcm", guidance_scale=0.0, timesteps=(999, 499)))


def settled(facts: Facts) -> tuple[str, int, float, tuple[int, ...] | None]:
    return (
        facts.default_sampler, facts.default_num_steps, facts.default_guidance_scale,
        facts.default_timesteps,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "chosen", "expected"),
    [
        (OWN, Defaults(), ("ddim", 25, 7.5, None)),
        (OWN, Defaults(num_steps=8), ("ddim", 8, 7.5, None)),
        (OWN, Defaults("lcm", 4, 1.0), ("lcm", 4, 1.0, None)),
        (OWN, Defaults("lcm", timesteps=(800,)), ("lcm", 1, 7.5, (800,))),
        (OWN, Defaults("lcm", 2, timesteps=(999, 499)), ("lcm", 2, 7.5, (999, 499))),
        (PINNED, Defaults(), ("lcm", 2, 0.0, (999, 499))),
        (PINNED, Defaults(guidance_scale=1.5), ("lcm", 2, 1.5, (999, 499))),
        (PINNED, Defaults("lcm", 2), ("lcm", 2, 0.0, (999, 499))),
        (PINNED, Defaults(timesteps=(399,)), ("lcm", 1, 0.0, (399,))),
        (PINNED, Defaults("tcd"), ("tcd", 2, 0.0, None)),  # what was pinned was LCM's
        (PINNED, Defaults(num_steps=4), ("lcm", 4, 0.0, None)),
    ],
)
def test_choices_go_over_what_a_model_has(
    facts: Facts, chosen: Defaults, expected: tuple[str, int, float, tuple[int, ...] | None]
) -> None:
    assert settled(with_defaults(facts, chosen)) == expected


def test_a_manifest_keeps_them() -> None:
    assert settled(Facts.from_json(PINNED.to_json())) == settled(PINNED)
    older = PINNED.to_json()
    del older["default_timesteps"]
    assert Facts.from_json(older) == dataclasses.replace(PINNED, default_timesteps=None)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (Defaults(timesteps=(800,)), "timesteps is .800. and the sampler ddim takes none"),
        (Defaults("lcm", 60), "num_inference_steps is 60; the lcm sampler takes 1 to 50"),
        (Defaults("lcm", 3, timesteps=(800,)), "timesteps is .800. and num_inference_steps is 3"),
        (Defaults("lcm", timesteps=(400, 800)), "timesteps is .400, 800.; each must be below"),
        (Defaults("heun"), "sampler is 'heun'; known are"),
    ],
)
def test_what_no_row_could_be_drawn_with_is_refused_at_once(chosen: Defaults, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        with_defaults(OWN, chosen)
