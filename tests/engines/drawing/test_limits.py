"""What a table, a schedule or a model cannot serve is refused by name, never ignored."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, LCMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engines.drawing.model import load_model
from engines.drawing.runner import Runner
from engines.drawing.stage import Stage
from engines.errors import CheckpointError, InvalidInput
from engines.order import Order
from engines.samplers import SAMPLERS, NoiseSchedule, make_schedule
from tests.engines.peers import recipe

BASE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
}  # fmt: skip


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
def test_scheduler_options(option: str, value: object) -> None:
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
        make_schedule(noise, sampler, num_steps, strength=strength, image_to_image=True, eta=eta)
    assert caught.value.field == field


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
    config: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": kind}
    peer = DDIMScheduler(**config, clip_sample=False)
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    np.testing.assert_allclose(ours, peer.alphas_cumprod.numpy(), rtol=2e-5, atol=1e-9)


@given(num_steps=st.integers(1, 50), sampler=st.sampled_from(SAMPLERS))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_tables_are_finite_and_end_without_noise(num_steps: int, sampler: str) -> None:
    schedule = make_schedule(NoiseSchedule.from_config(BASE), sampler, num_steps)
    assert np.isfinite(schedule.coefficients).all()
    assert all(later < earlier for earlier, later in itertools.pairwise(schedule.timesteps))
    assert schedule.coefficients[-1, 5] == 0.0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"width_px": 65}, "width_px"), ({"height_px": 0}, "height_px"),
        ({"height_px": 10**6}, "height_px"), ({"num_steps": 0}, "num_steps"),
        ({"sampler": "heun"}, "sampler"), ({"eta": 1.5}, "eta"), ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"), ({"guidance_scale": float("nan")}, "guidance_scale"),
    ],
)  # fmt: skip
def test_recipes(
    changes: dict[str, Any], field: str, runners: dict[tuple[str, str], Runner]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        runners["tiny-lcm", "torch"].start(recipe(**changes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "image", [np.zeros((64, 32, 3), np.uint8), np.zeros((64, 64, 3)), np.zeros((64, 64), np.uint8)]
)
def test_input_images(image: np.ndarray, runners: dict[tuple[str, str], Runner]) -> None:
    """One of the wrong shape would fail the whole batch it is encoded with."""
    with pytest.raises(InvalidInput) as caught:
        runners["tiny-lcm", "torch"].start(recipe(image=image))
    assert caught.value.field == "image"


def test_a_known_prompt_skips_the_text_encoder(
    runners: dict[tuple[str, str], Runner],
) -> None:
    runner = runners["tiny-sd", "torch"]
    wanted = recipe(prompt="never seen before", negative_prompt="nor this", guidance_scale=5.0)
    row = runner.start(wanted)
    assert row.stage is Stage.ENCODE_TEXT
    assert row.num_lanes == 2
    runner.encode_text([row])
    assert runner.start(wanted).stage is Stage.DENOISE


def test_a_long_prompt_says_how_much_was_lost(runners: dict[tuple[str, str], Runner]) -> None:
    runner = runners["tiny-lcm", "torch"]
    assert runner.start(recipe(prompt="ab")).num_truncated_tokens == (0,)
    assert runner.start(recipe(prompt="word " * 50)).num_truncated_tokens[0] > 100


def test_a_negative_prompt_loses_tokens_too(runners: dict[tuple[str, str], Runner]) -> None:
    runner = runners["tiny-sd", "torch"]
    wanted = recipe(prompt="ab", negative_prompt="word " * 50, guidance_scale=5.0)
    lost = runner.start(wanted).num_truncated_tokens
    assert lost[0] == 0
    assert lost[1] > 100


def test_a_tokenizer_saved_after_use_still_says_what_was_lost(
    checkpoints: Path, tmp_path: Path
) -> None:
    """It carries truncation and padding with it, which would hide every loss."""
    shutil.copytree(checkpoints / "tiny-lcm", tmp_path / "used")
    file = tmp_path / "used" / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(file))
    used = Order(str(tmp_path / "used"), cache_dir=tmp_path)
    for model in (
        load_model(dataclasses.replace(used, backend="torch"), lambda *_: None),
        load_model(dataclasses.replace(used, backend="onnxruntime"), lambda *_: None),
    ):
        plain = load_model(Order(str(checkpoints / "tiny-lcm"), "torch"), lambda *_: None)
        for text in ("a", "word " * 50):
            ids, num_lost = model.tokenize(text)
            expected, expected_lost = plain.tokenize(text)
            assert ids is not None
            assert expected is not None
            assert ids["input_ids"].tolist() == expected["input_ids"].tolist()
            assert num_lost == expected_lost
        assert num_lost > 100
