"""Coefficient tables against diffusers' own schedulers, step by step, for any config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st

from engines.errors import InvalidInput
from engines.samplers import SAMPLERS, NoiseSchedule, Schedule, make_schedule, samplers_of
from tests.engines.peers import scheduler_of

pytestmark = pytest.mark.filterwarnings(
    # diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2.4 deprecates.
    "ignore:__array__ implementation:DeprecationWarning",
    # Float64 levels to diffusers' own float32 betas: a division by ᾱ = 0 that no step then uses.
    "ignore:divide by zero:RuntimeWarning",
)
SHAPE = (1, 4, 6, 6)
TRAINING: dict[str, list[Any]] = {
    "num_train_timesteps": [1000],
    "beta_start": [0.00085],
    "beta_end": [0.012],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [None, np.linspace(0.0004, 0.015, 1000).tolist()],
    "prediction_type": ["epsilon", "v_prediction", "sample"],
}
SPACED = {"timestep_spacing": ["leading", "trailing", "linspace"], "steps_offset": [0, 1]}
CLIPPED = {"clip_sample": [False, True], "thresholding": [False, True]}
RESCALED = {"rescale_betas_zero_snr": [False, True]}
RESPACED = {"use_karras_sigmas": [False, True], "use_exponential_sigmas": [False, True]}
SOLVER: dict[str, list[Any]] = {
    **TRAINING, **SPACED, **RESPACED, "solver_order": [1, 2, 3], "thresholding": [False],
    "lower_order_final": [True, False],
}  # fmt: skip
DISTILLED = TRAINING | CLIPPED | RESCALED | {
    "set_alpha_to_one": [True, False], "steps_offset": [0, 1], "timestep_spacing": ["leading"],
    "original_inference_steps": [50, 40, 100], "timestep_scaling": [10.0, 5.0],
}  # fmt: skip
# What the scheduler classes of Stable Diffusion checkpoints write, and values they may have.
CLASSES: dict[str, dict[str, list[Any]]] = {
    "LCMScheduler": DISTILLED,
    "TCDScheduler": DISTILLED,
    "DDIMScheduler": TRAINING | SPACED | CLIPPED | RESCALED | {"set_alpha_to_one": [True, False]},
    "DDPMScheduler": TRAINING | SPACED | CLIPPED | RESCALED | {"variance_type": ["fixed_small"]},
    "PNDMScheduler": TRAINING | SPACED | {
        "set_alpha_to_one": [False, True], "skip_prk_steps": [True], "clip_sample": [False],
    },
    "EulerDiscreteScheduler": TRAINING | SPACED | RESCALED | RESPACED | {
        "interpolation_type": ["linear", "log_linear"], "timestep_type": ["discrete", "continuous"],
        "sigma_min": [None, 0.05], "sigma_max": [None, 12.0],
        "final_sigmas_type": ["zero", "sigma_min"],
    },
    "EulerAncestralDiscreteScheduler": TRAINING | SPACED | RESCALED,
    "HeunDiscreteScheduler": TRAINING | SPACED | RESPACED | {"clip_sample": [False]},
    "DPMSolverMultistepScheduler": SOLVER | RESCALED | {
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"], "solver_type": ["midpoint", "heun"],
        "euler_at_final": [False, True], "use_lu_lambdas": [False, True],
        "final_sigmas_type": ["zero", "sigma_min"], "lambda_min_clipped": [-math.inf, -5.1],
        "variance_type": [None, "learned_range"],
    },
    "DEISMultistepScheduler": SOLVER | {"solver_type": ["logrho"], "algorithm_type": ["deis"]},
    "UniPCMultistepScheduler": SOLVER | RESCALED | {
        "solver_type": ["bh1", "bh2"], "final_sigmas_type": ["zero", "sigma_min"],
        "sigma_min": [None, 0.05], "predict_x0": [True],
    },
}  # fmt: skip
BEYOND_A_TABLE = {
    "clip_sample": True, "thresholding": True, "solver_order": 3, "variance_type": "learned_range",
    "prediction_type": "sample",  # EulerAncestralDiscreteScheduler has no rule for it
}  # fmt: skip
OURS = {
    "LCMScheduler": ["lcm"], "TCDScheduler": ["tcd"], "DDIMScheduler": ["ddim"],
    "EulerDiscreteScheduler": ["euler"], "EulerAncestralDiscreteScheduler": ["euler_ancestral"],
    "DPMSolverMultistepScheduler": ["dpmpp_2m", "dpmpp_2m_sde"],
}  # fmt: skip


@st.composite
def configs(draw: st.DrawFn, classes: Mapping[str, Any] = CLASSES) -> dict[str, Any]:
    """A ``scheduler_config.json``: each key may be absent."""
    name = draw(st.sampled_from(sorted(classes)))
    keys = CLASSES[name].items()
    maybe = {key: st.sampled_from(values) for key, values in keys}
    config = draw(st.fixed_dictionaries({}, optional=maybe))
    assume(not (config.get("use_karras_sigmas") and config.get("use_exponential_sigmas")))
    return {"_class_name": name, **config}


def fake_unet(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Any smooth function will do: the samplers only combine what it returns."""
    return torch.sin(3 * sample + 0.01 * timestep) + 0.3 * sample


def assert_agrees(table: Schedule, peer: Any, strength: float, extra: dict[str, float]) -> None:
    """Where both start, and every step from the same sample: inputs, outcome, noise drawn.

    And at every timestep an image and noise mixed, as inpainting does.
    """
    first = len(peer.timesteps) - min(int(len(peer.timesteps) * strength), len(peer.timesteps))
    if hasattr(peer, "set_begin_index"):
        peer.set_begin_index(first)
    timesteps = peer.timesteps[first:]
    np.testing.assert_allclose(table.timesteps, timesteps.numpy(), rtol=1e-5, atol=1e-4)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    image, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    pure = noise * peer.init_noise_sigma
    assert_close(table.init_noise * noise, pure, [pure])
    sample = peer.add_noise(image, noise, timesteps[:1]) if strength < 1 else pure
    previous = torch.zeros(SHAPE)
    for index, timestep in enumerate(timesteps):
        alpha, sigma = (float(level) for level in table.levels[index])
        noised = peer.add_noise(image, noise, timestep[None])
        assert_close(alpha * image + sigma * noise, noised, [alpha * image, sigma * noise])
        i, a, b, p, q, r, s = (float(c) for c in table.coefficients[index])
        scaled = peer.scale_model_input(sample, timestep)
        assert_close(i * sample, scaled, [scaled])
        output = fake_unet(scaled, float(timestep))
        fresh = torch.zeros(SHAPE)
        if table.draws_noise[index]:
            fresh = torch.randn(SHAPE, generator=generators[0])
        terms = [p * sample, q * output, r * fresh, s * previous]
        rounded = [*terms, sample, a * sample, b * output]  # on diffusers' way to the same
        previous = a * sample + b * output
        sample = peer.step(output, timestep, sample, generator=generators[1], **extra)[0]
        # Heun's form from σ to the same σ, or σ near 10⁴ in float32: diffusers' own is no number.
        assume(bool(torch.isfinite(sample).all()))
        assert_close(torch.stack(terms).sum(0), sample, rounded)
    assert table.levels[len(timesteps) :].tolist() == [[1, 0]]
    assert torch.equal(*(generator.get_state() for generator in generators))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, terms: list[torch.Tensor]) -> None:
    """To the root of float32's rounding: diffusers' η is one of a difference near 0."""
    scale = max(1.0, *(float(term.abs().max()) for term in terms))
    assert float((ours - theirs).abs().max()) <= 1e-3 * scale


def compare(
    config: dict[str, Any], sampler: str, steps: int | tuple[int, ...], strength: float, eta: float
) -> None:
    """A sampler on a config: as diffusers draws, or refused for an option that diffusers obeys.

    ``steps`` are a count, or the timesteps themselves.
    """
    note(f"{sampler}, steps {steps}, strength {strength}, eta {eta}: {config}"[:1000])
    num_steps, timesteps = (steps, None) if isinstance(steps, int) else (len(steps), steps)
    noise = NoiseSchedule.from_config(config)
    peer = scheduler_of(sampler, config)
    assume(int(num_steps * strength) >= 1)
    try:
        table = make_schedule(
            noise, sampler, num_steps, strength=strength, eta=eta, timesteps=timesteps
        )
    except InvalidInput as refused:
        text = str(refused)
        if refused.field == "timesteps":
            assert "takes none" in text
            with pytest.raises((TypeError, ValueError), match="timesteps"):
                peer.set_timesteps(timesteps=timesteps)
            return
        if "epsilon" in text:  # ᾱ = 0: diffusers divides by it
            assert peer.config.rescale_betas_zero_snr
            assert peer.alphas_cumprod[-1] == 0
            return
        assert sampler not in samplers_of(noise)
        name = text.split("option ")[1].split("=")[0]
        assert peer.config[name] == BEYOND_A_TABLE[name]
        return
    assert sampler in samplers_of(noise)
    extra = {"eta": eta} if sampler in ("ddim", "tcd") else {}
    if timesteps is None:
        peer.set_timesteps(num_steps)
    else:
        peer.set_timesteps(timesteps=list(timesteps))
    assert_agrees(table, peer, strength, extra)


STEPS = st.integers(1, 20)
NAMED = st.lists(st.integers(0, 999), min_size=1, max_size=8, unique=True).map(
    lambda timesteps: tuple(sorted(timesteps, reverse=True))
)
STRENGTH = st.sampled_from([1.0, 0.8, 0.5])
ETA = st.sampled_from([0.0, 0.3, 1.0])


@settings(max_examples=400, deadline=None)
@given(configs(OURS), st.data(), STEPS, STRENGTH, ETA)
def test_agrees_with_its_own_class(
    config: dict[str, Any], data: st.DataObject, num_steps: int, strength: float, eta: float
) -> None:
    sampler = data.draw(st.sampled_from(OURS[config["_class_name"]]))
    compare(config, sampler, num_steps, strength, eta)


@settings(max_examples=400, deadline=None)
@given(configs(), st.sampled_from(SAMPLERS), STEPS, STRENGTH, ETA)
def test_agrees_on_configs_of_other_classes(
    config: dict[str, Any], sampler: str, num_steps: int, strength: float, eta: float
) -> None:
    """What a config lacks has the default of the sampler's class, not of the config's."""
    compare(config, sampler, num_steps, strength, eta)


@settings(max_examples=400, deadline=None)
@given(configs(), st.sampled_from(SAMPLERS), NAMED, STRENGTH, ETA)
def test_agrees_at_named_timesteps(
    config: dict[str, Any],
    sampler: str,
    timesteps: tuple[int, ...],
    strength: float,
    eta: float,
) -> None:
    """Any that descend; samplers whose class takes none, or not with an option, refuse them."""
    compare(config, sampler, timesteps, strength, eta)


@pytest.mark.parametrize(("last", "eta"), [(90, 0.3), (650, 0.3), (15, 0.8), (80, 0.9)])
def test_tcd_aims_at_the_same_timestep(last: int, eta: float) -> None:
    """(1 - η) · t is a whole number here, and in float64 a bit less than one or a bit more."""
    peer = scheduler_of("tcd", {})
    peer.set_timesteps(timesteps=[999, last])
    table = make_schedule(NoiseSchedule.from_config({}), "tcd", 2, eta=eta, timesteps=(999, last))
    sample, output = torch.full((2, *SHAPE), 0.5)
    aimed = peer.step(output, peer.timesteps[0], sample, eta=eta).pred_noised_sample
    _, _, _, p, q, r, _ = (float(c) for c in table.coefficients[0])
    kept = math.sqrt(1 - r**2)  # of what was aimed at, once it is noised up to the last timestep
    torch.testing.assert_close((p * sample + q * output) / kept, aimed, rtol=1e-5, atol=0)
