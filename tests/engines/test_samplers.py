"""The tables against diffusers' own schedulers, step by step, on random model outputs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import CheckpointError, InvalidInput
from engines.samplers import SAMPLERS, NoiseSchedule, Schedule, make_schedule

# diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2.4 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PEERS = {
    "lcm": LCMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "tcd": TCDScheduler,
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
CASES = [
    case
    for case in itertools.product(SAMPLERS, PREDICTIONS, SPACINGS)
    if case[:2] != ("euler_ancestral", "sample")  # diffusers itself does not have it
]
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _config(prediction: str, spacing: str, **more: Any) -> dict[str, Any]:
    return BASE | {"prediction_type": prediction, "timestep_spacing": spacing} | more


def _peer(sampler: str, config: dict[str, Any]) -> Any:
    if sampler in ("ddim", "lcm", "tcd"):
        config = {"clip_sample": False} | config
    return PEERS[sampler](**{k: v for k, v in config.items() if _takes(PEERS[sampler], k)})


def _takes(scheduler: type, option: str) -> bool:
    return option in scheduler.__init__.__code__.co_varnames or option in scheduler().config


def _follow(schedule: Schedule, sample: np.ndarray, outputs: Any, noises: Any) -> np.ndarray:
    """Run a table on given model outputs and noises, in float32 as the graph does."""
    for step in range(schedule.num_steps):
        _, _, _, p, q, r = schedule.coefficients[step]
        noise = next(noises) if schedule.draws_noise[step] else np.zeros_like(sample)
        sample = p * sample + q * outputs[step] + r * noise
    return sample


def _follow_peer(peer: Any, sampler: str, x: torch.Tensor, outputs: Any, **more: Any) -> Any:
    for index, timestep in enumerate(peer.timesteps):
        peer.scale_model_input(x, timestep)
        extra = dict(more)
        if sampler not in ("ddim", "tcd"):
            extra.pop("eta", None)
        if sampler == "euler":
            extra.pop("generator")
        x = peer.step(torch.from_numpy(outputs[index]), timestep, x, **extra, return_dict=False)[0]
    return x.numpy()


@pytest.mark.parametrize(("sampler", "prediction", "spacing"), CASES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    num_steps=st.integers(1, 12),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
    to_one=st.booleans(),
    offset=st.sampled_from([0, 1]),
)
def test_agrees_with_diffusers_scheduler(
    sampler: str, prediction: str, spacing: str, num_steps: int, eta: float, to_one: bool,
    offset: int,
) -> None:  # fmt: skip
    config = _config(prediction, spacing, set_alpha_to_one=to_one, steps_offset=offset)
    peer = _peer(sampler, config)
    peer.set_timesteps(num_steps)
    schedule = make_schedule(NoiseSchedule.from_config(config), sampler, num_steps, eta=eta)
    np.testing.assert_allclose(schedule.timesteps, peer.timesteps.numpy(), atol=1e-3)

    rng = np.random.default_rng(num_steps)
    outputs = rng.standard_normal((num_steps, 16)).astype(np.float32)
    noise = rng.standard_normal(16).astype(np.float32)
    drawn = torch.Generator().manual_seed(7)
    noises = (torch.randn(16, generator=drawn).numpy() for _ in itertools.count())
    ours = _follow(schedule, schedule.noise_scale * noise, outputs, noises)
    start = torch.from_numpy(noise) * peer.init_noise_sigma
    theirs = _follow_peer(
        peer, sampler, start, outputs, eta=eta, generator=torch.Generator().manual_seed(7)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-4 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral"])
@pytest.mark.parametrize("strength", [0.3, 0.55, 1.0])
def test_image_to_image_starts_where_diffusers_does(sampler: str, strength: float) -> None:
    config = _config("epsilon", "trailing")
    peer = _peer(sampler, config)
    peer.set_timesteps(8)
    kept = min(int(8 * strength), 8)
    timesteps = peer.timesteps[8 - kept :]
    if hasattr(peer, "set_begin_index"):  # as the img2img pipeline does
        peer.set_begin_index(8 - kept)
    schedule = make_schedule(
        NoiseSchedule.from_config(config), sampler, 8, strength=strength, image_to_image=True
    )
    assert schedule.num_steps == kept
    x0, noise = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    theirs = peer.add_noise(x0, noise, timesteps[:1])
    ours = schedule.sample_scale * x0 + schedule.noise_scale * noise
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8, 1.0])
def test_lcm_takes_strength_into_its_schedule(strength: float) -> None:
    peer = LCMScheduler(**BASE)
    peer.set_timesteps(4, strength=strength)
    schedule = make_schedule(
        NoiseSchedule.from_config(BASE), "lcm", 4, strength=strength, image_to_image=True
    )
    np.testing.assert_array_equal(schedule.timesteps, peer.timesteps.numpy())


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_training_schedules(kind: str) -> None:
    config = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": kind}
    peer = DDIMScheduler(**config, clip_sample=False)
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    np.testing.assert_allclose(ours, peer.alphas_cumprod.numpy(), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clip_sample", True), ("thresholding", True), ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True), ("use_beta_sigmas", True), ("use_flow_sigmas", True),
        ("rescale_betas_zero_snr", True), ("trained_betas", [0.1, 0.2]),
        ("prediction_type", "flow_prediction"), ("timestep_spacing", "random"),
        ("beta_schedule", "sigmoid"), ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"), ("final_sigmas_type", "sigma_min"), ("sigma_min", 0.1),
    ],
)  # fmt: skip
def test_refuses_what_a_table_cannot_hold(option: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=option):
        NoiseSchedule.from_config(BASE | {option: value})


@pytest.mark.parametrize(
    ("sampler", "num_steps", "strength", "eta", "field"),
    [
        ("dpm", 4, 1.0, None, "sampler"),
        ("lcm", 0, 1.0, None, "num_steps"),
        ("lcm", 51, 1.0, None, "num_steps"),
        ("lcm", 8, 0.1, None, "num_steps"),
        ("ddim", 1001, 1.0, None, "num_steps"),
        ("ddim", 4, 0.1, None, "strength"),
        ("tcd", 4, 1.0, 1.5, "eta"),
        ("ddim", 4, 1.0, -0.1, "eta"),
    ],
)
def test_refuses_values_that_cannot_be_served(
    sampler: str, num_steps: int, strength: float, eta: float | None, field: str
) -> None:
    noise = NoiseSchedule.from_config(BASE)
    with pytest.raises(InvalidInput) as caught:
        make_schedule(noise, sampler, num_steps, strength=strength, image_to_image=True, eta=eta)
    assert caught.value.field == field


@given(num_steps=st.integers(1, 50), sampler=st.sampled_from(SAMPLERS))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_tables_are_finite_and_end_without_noise(num_steps: int, sampler: str) -> None:
    schedule = make_schedule(NoiseSchedule.from_config(BASE), sampler, num_steps)
    assert np.isfinite(schedule.coefficients).all()
    assert (np.diff(schedule.timesteps) < 0).all()
    assert schedule.coefficients[-1, 5] == 0.0
