"""Coefficient tables against diffusers' own schedulers, step by step."""

from __future__ import annotations

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
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engines.errors import CheckpointError, InvalidInput
from engines.samplers import SAMPLERS, NoiseSchedule, make_schedule

BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PEERS = {
    "lcm": LCMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "tcd": TCDScheduler,
}


def fake_unet(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Any smooth function will do: the samplers only combine what it returns."""
    return torch.sin(3 * sample + 0.01 * float(timestep)) + 0.3 * sample


@settings(max_examples=60, deadline=None)
@given(
    sampler=st.sampled_from(SAMPLERS),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    num_steps=st.integers(1, 9),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_agrees_with_diffusers(
    sampler: str, prediction: str, spacing: str, num_steps: int, eta: float
) -> None:
    assume((sampler, prediction) != ("euler_ancestral", "sample"))  # the peer has no such rule
    options = BASE | {"prediction_type": prediction, "timestep_spacing": spacing}
    options |= {"steps_offset": 1} if spacing == "leading" else {}
    if not sampler.startswith("euler"):
        options |= {"clip_sample": False, "set_alpha_to_one": False}
    peer = PEERS[sampler](**options)
    peer.set_timesteps(num_steps)
    table = make_schedule(NoiseSchedule.from_config(peer.config), sampler, num_steps, eta=eta)
    np.testing.assert_allclose(table.timesteps, peer.timesteps.numpy(), rtol=1e-6)
    theirs_generator = torch.Generator().manual_seed(7)
    ours_generator = torch.Generator().manual_seed(7)
    shape = (1, 4, 6, 6)
    theirs = torch.randn(shape, generator=theirs_generator) * peer.init_noise_sigma
    ours = torch.randn(shape, generator=ours_generator) * table.noise_scale
    before = torch.zeros(shape)
    extra = {"eta": eta} if sampler in ("ddim", "tcd") else {}
    for index, timestep in enumerate(peer.timesteps):
        output = fake_unet(peer.scale_model_input(theirs, timestep), timestep)
        theirs = peer.step(output, timestep, theirs, generator=theirs_generator, **extra)[0]
        i, a, b, p, q, r, s = (float(c) for c in table.coefficients[index])
        output = fake_unet(i * ours, timestep)
        noise = torch.zeros(shape)
        if table.draws_noise[index]:
            noise = torch.randn(shape, generator=ours_generator)
        denoised = a * ours + b * output
        ours, before = p * ours + q * output + r * noise + s * before, denoised
    scale = max(1.0, float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) / scale < 1e-3


@pytest.mark.parametrize("option", [{"clip_sample": True}, {"use_karras_sigmas": True}])
def test_options_outside_a_table_are_refused(option: dict[str, bool]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(option))):
        NoiseSchedule.from_config(BASE | option)


def test_limits_are_named() -> None:
    noise = NoiseSchedule.from_config(BASE)
    with pytest.raises(InvalidInput, match="1 to 50"):
        make_schedule(noise, "lcm", 51)
    with pytest.raises(InvalidInput, match="known are lcm"):
        make_schedule(noise, "heun", 4)
    with pytest.raises(InvalidInput, match="leaves no step"):
        make_schedule(noise, "ddim", 2, strength=0.1, image_to_image=True)
