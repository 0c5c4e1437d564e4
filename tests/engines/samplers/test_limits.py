"""What a table or a schedule cannot hold is refused by name, for the samplers that have it."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import DDIMScheduler, LCMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import CheckpointError, InvalidInput
from engines.samplers import (
    SAMPLERS,
    NoiseSchedule,
    default_sampler,
    given_options,
    make_schedule,
    samplers_of,
)
from tests.engines.peers import SCHEDULERS

BASE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False,
}  # fmt: skip
DPMPP = {"dpmpp_2m", "dpmpp_2m_sde"}
SPACED = {"ddim", "euler", "euler_ancestral"} | DPMPP


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("prediction_type", "flow_prediction"), ("beta_schedule", "sigmoid"),
        ("trained_betas", [0.1, 0.2]), ("_class_name", "EDMEulerScheduler"),
    ],
)  # fmt: skip
def test_checkpoints_that_no_sampler_draws(option: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=value if option == "_class_name" else option):
        NoiseSchedule.from_config(BASE | {option: value})


@pytest.mark.parametrize(
    ("option", "value", "refusing"),
    [
        ("clip_sample", True, {"lcm", "ddim"}), ("thresholding", True, {"lcm", "ddim"} | DPMPP),
        ("use_beta_sigmas", True, {"euler"} | DPMPP), ("use_flow_sigmas", True, DPMPP),
        ("timestep_spacing", "random", SPACED), ("interpolation_type", "cubic", {"euler"}),
        ("timestep_type", "random", {"euler"}), ("final_sigmas_type", "one", {"euler"} | DPMPP),
        ("solver_order", 3, DPMPP), ("solver_type", "rk4", DPMPP),
        ("variance_type", "learned_range", DPMPP),
        ("prediction_type", "sample", {"euler_ancestral"}),
    ],
)  # fmt: skip
def test_an_option_refuses_the_samplers_that_have_it(
    option: str, value: object, refusing: set[str]
) -> None:
    noise = NoiseSchedule.from_config(BASE | {option: value})
    assert set(samplers_of(noise)) == set(SAMPLERS) - refusing
    for sampler in SAMPLERS:
        if sampler not in refusing:
            assert np.isfinite(make_schedule(noise, sampler, 4).coefficients).all()
            continue
        with pytest.raises(InvalidInput, match=f"{option}={value!r}; use .*tcd") as caught:
            make_schedule(noise, sampler, 4)
        assert caught.value.field == "sampler"


def test_noise_says_nothing_of_an_image_without_signal() -> None:
    noise = NoiseSchedule.from_config(BASE | {"rescale_betas_zero_snr": True})
    with pytest.raises(InvalidInput, match="rescale_betas_zero_snr"):
        make_schedule(noise, "lcm", 4)
    assert np.isfinite(make_schedule(noise, "euler", 4).coefficients).all()


@pytest.mark.parametrize(
    ("sampler", "num_steps", "strength", "eta", "field"),
    [
        ("dpm", 4, 1.0, None, "sampler"),
        ("lcm", 0, 1.0, None, "num_steps"),
        ("lcm", 51, 1.0, None, "num_steps"),
        ("lcm", 8, 0.1, None, "num_steps"),
        ("ddim", 1001, 1.0, None, "num_steps"),
        ("dpmpp_2m", 1000, 1.0, None, "num_steps"),
        ("ddim", 4, 0.1, None, "strength"),
        ("lcm", 4, 0.0, None, "strength"),
        ("euler", 4, 1.5, None, "strength"),
        ("euler", 4, float("nan"), None, "strength"),
        ("tcd", 4, 1.0, 1.5, "eta"),
        ("ddim", 4, 1.0, -0.1, "eta"),
    ],
)
def test_schedules(
    sampler: str, num_steps: int, strength: float, eta: float | None, field: str
) -> None:
    noise = NoiseSchedule.from_config(BASE)
    with pytest.raises(InvalidInput) as caught:
        make_schedule(
            noise, sampler, num_steps, strength=strength, strength_drops_steps=False, eta=eta
        )
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("sampler", "num_steps", "message"),
    [("lcm", 51, "1 to 50"), ("heun", 4, "known are lcm, ddim, .*dpmpp_2m_sde")],
)
def test_limits_are_named(sampler: str, num_steps: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make_schedule(NoiseSchedule.from_config(BASE), sampler, num_steps)


TAKERS = "lcm, euler, tcd, dpmpp_2m, dpmpp_2m_sde"
KARRAS = {"use_karras_sigmas": True}
CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
NOT_TAKEN = "takes none with the checkpoint's scheduler option"


@pytest.mark.parametrize(
    ("config", "sampler", "num_steps", "timesteps", "message"),
    [
        ({}, "ddim", 1, (800,), f"[800] and the sampler ddim takes none; leave timesteps out or "
         f"use {TAKERS}"),
        ({}, "euler_ancestral", 2, (999, 499), "[999, 499] and the sampler euler_ancestral takes "
         f"none; leave timesteps out or use {TAKERS}"),
        (KARRAS, "euler", 1, (800,), f"[800] and the sampler euler {NOT_TAKEN} "
         "use_karras_sigmas=True; leave timesteps out or use lcm, tcd"),
        ({"use_exponential_sigmas": True}, "dpmpp_2m", 1, (800,), "[800] and the sampler dpmpp_2m "
         f"{NOT_TAKEN} use_exponential_sigmas=True; leave timesteps out or use lcm, tcd"),
        ({"use_lu_lambdas": True}, "dpmpp_2m_sde", 1, (800,), "[800] and the sampler dpmpp_2m_sde "
         f"{NOT_TAKEN} use_lu_lambdas=True; leave timesteps out or use lcm, euler, tcd"),
        (CONTINUOUS, "euler", 1, (800,), f"[800] and the sampler euler {NOT_TAKEN} "
         "timestep_type='continuous'; leave timesteps out or use lcm, tcd, dpmpp_2m, dpmpp_2m_sde"),
        ({}, "lcm", 0, (), "[]; name at least one, or leave it out"),
        ({}, "lcm", 3, (999, 499), "[999, 499] and num_inference_steps is 3; it must be 2, one "
         "step for each, or left out"),
        ({}, "lcm", 2, (1000, 499), "[1000, 499]; each must be from 0 to 999, the training's last"),
        ({"num_train_timesteps": 500}, "tcd", 1, (500,), "[500]; each must be from 0 to 499, the "
         "training's last"),
        ({}, "lcm", 2, (499, -1), "[499, -1]; each must be from 0 to 999, the training's last"),
        ({}, "euler", 2, (499, 999), "[499, 999]; each must be below the one before it, the "
         "noisiest is first"),
        ({}, "dpmpp_2m", 2, (499, 499), "[499, 499]; each must be below the one before it, the "
         "noisiest is first"),
        ({}, "lcm", 20, tuple(range(20)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]; each must be below the "
         "one before it, the noisiest is first"),
    ],
)  # fmt: skip
def test_timesteps(
    config: dict[str, Any], sampler: str, num_steps: int, timesteps: tuple[int, ...], message: str
) -> None:
    noise = NoiseSchedule.from_config(BASE | config)
    with pytest.raises(InvalidInput) as caught:
        make_schedule(noise, sampler, num_steps, timesteps=timesteps)
    assert (caught.value.field, str(caught.value)) == ("timesteps", f"timesteps is {message}")


def test_more_timesteps_than_a_distillation_had() -> None:
    """LCM's own spacing has 50; of timesteps that are named there may be more, as in diffusers."""
    timesteps = tuple(range(599, -1, -10))
    peer = LCMScheduler(**BASE)
    peer.set_timesteps(timesteps=list(timesteps))
    schedule = make_schedule(
        NoiseSchedule.from_config(BASE), "lcm", len(timesteps), timesteps=timesteps
    )
    np.testing.assert_array_equal(schedule.timesteps, peer.timesteps.numpy())


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8, 1.0])
def test_lcm_takes_strength_into_its_schedule(strength: float) -> None:
    peer = LCMScheduler(**BASE)
    peer.set_timesteps(4, strength=strength)
    noise = NoiseSchedule.from_config(BASE)
    schedule = make_schedule(noise, "lcm", 4, strength=strength, strength_drops_steps=False)
    np.testing.assert_array_equal(schedule.timesteps, peer.timesteps.numpy())


@given(num_steps=st.integers(1, 50), sampler=st.sampled_from(SAMPLERS))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_tables_are_finite_and_end_without_noise(num_steps: int, sampler: str) -> None:
    schedule = make_schedule(NoiseSchedule.from_config(BASE), sampler, num_steps)
    assert np.isfinite(schedule.coefficients).all()
    assert all(later < earlier for earlier, later in itertools.pairwise(schedule.timesteps))
    assert schedule.coefficients[-1, 5] == 0.0
    assert not schedule.coefficients[0, 6]  # there is no step before the first


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_class_of_ours_draws_by_itself(sampler: str) -> None:
    algorithm = "sde-dpmsolver++" if sampler == "dpmpp_2m_sde" else "dpmsolver++"
    config = BASE | {"_class_name": SCHEDULERS[sampler].__name__, "algorithm_type": algorithm}
    assert default_sampler(NoiseSchedule.from_config(config)) == (sampler, False)


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [
        ("PNDMScheduler", "ddim"), ("DDPMScheduler", "ddim"), ("LMSDiscreteScheduler", "euler"),
        ("HeunDiscreteScheduler", "euler"), ("KDPM2DiscreteScheduler", "euler"),
        ("KDPM2AncestralDiscreteScheduler", "euler_ancestral"),
        ("DPMSolverSinglestepScheduler", "dpmpp_2m"), ("DEISMultistepScheduler", "dpmpp_2m"),
        ("UniPCMultistepScheduler", "dpmpp_2m"), ("DPMSolverSDEScheduler", "dpmpp_2m_sde"),
        ("SomebodysScheduler", "ddim"),
    ],
)  # fmt: skip
def test_another_class_has_a_stand_in(scheduler: str, sampler: str) -> None:
    assert scheduler in ("SomebodysScheduler", *dir(diffusers))
    noise = NoiseSchedule.from_config(BASE | {"_class_name": scheduler})
    assert default_sampler(noise) == (sampler, True)


@pytest.mark.parametrize(
    ("config", "sampler"),
    [
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "euler"),
        ({"_class_name": "LCMScheduler", "clip_sample": True}, "tcd"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "ddim"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "dpmpp_2m"),
    ],
)  # fmt: skip
def test_a_stand_in_is_one_that_draws(config: dict[str, Any], sampler: str) -> None:
    assert default_sampler(NoiseSchedule.from_config(BASE | config)) == (sampler, True)


def test_what_diffusers_filled_in_is_not_given() -> None:
    peer = DDIMScheduler.from_config({"beta_end": 0.012, "timestep_spacing": "leading"})
    given = {"_class_name": "DDIMScheduler", "beta_end": 0.012, "timestep_spacing": "leading"}
    assert given_options(peer) == given
