"""The distillation's formulas agree with diffusers' schedulers and pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler

from engines.distill.consistency import (
    NUM_SOLVER_STEPS,
    SKIPPED,
    Solver,
    boundary_scalings,
    guidance_embedding,
    pseudo_huber,
)
from engines.distill.networks import NOISE, noise_schedule


@pytest.fixture
def solver() -> Solver:
    return Solver(noise_schedule().alphas_cumprod)


def test_the_skipping_step_is_ddims(solver: Solver) -> None:
    ddim = DDIMScheduler(**NOISE | {"steps_offset": 0})
    ddim.set_timesteps(NUM_SOLVER_STEPS // SKIPPED)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    velocity = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in (979, 519, 59):
        expected = ddim.step(velocity, t, latents, eta=0.0).prev_sample
        ours = solver.step(latents, velocity, torch.full((3,), t))
        assert (ours - expected).abs().max() < 1e-5


def test_the_grid_holds_every_timestep_that_lcm_sampling_visits(solver: Solver) -> None:
    scheduler = LCMScheduler(**NOISE, original_inference_steps=NUM_SOLVER_STEPS)
    drawn = set(solver.draw_timesteps(5_000, torch.Generator().manual_seed(0)).tolist())
    assert len(drawn) == NUM_SOLVER_STEPS
    for num_steps in range(1, 9):
        scheduler.set_timesteps(num_steps)
        assert set(scheduler.timesteps.tolist()) <= drawn


def test_the_consistency_function_is_the_schedulers(solver: Solver) -> None:
    scheduler = LCMScheduler(**NOISE, original_inference_steps=NUM_SOLVER_STEPS)
    scheduler.set_timesteps(4)
    latents, velocity = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for t in scheduler.timesteps.tolist():
        expected = scheduler.step(velocity, t, latents).denoised
        ours = solver.consistency(latents, velocity, torch.full((2,), t))
        assert (ours - expected).abs().max() < 1e-5


def test_at_timestep_zero_it_is_the_identity() -> None:
    c_skip, c_out = boundary_scalings(torch.tensor([0]))
    assert c_skip.item() == 1
    assert c_out.item() == 0


def test_the_guidance_embedding_is_the_pipelines() -> None:
    w = torch.tensor([0.0, 2.0, 7.5])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, w, embedding_dim=64
    )
    assert torch.equal(guidance_embedding(w, 64), expected)


def test_the_loss_is_nought_only_where_they_agree() -> None:
    one = torch.zeros(2, 3)
    assert pseudo_huber(one, one).item() == 0
    assert pseudo_huber(one, one + 1).item() == pytest.approx(1, abs=2e-3)
