"""Latent Consistency Distillation (arXiv 2310.04378): the solver, the scalings, the loss.

Pure tensor functions with the paper's symbols. Agrees with diffusers' LCMScheduler about the
boundary scalings and the timesteps, and with its pipeline about the guidance embedding.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

NUM_SOLVER_STEPS = 50  # of the grid that timesteps are drawn from, as `original_inference_steps`
SKIPPED = 2  # grid points in one solver step, k = 40 timesteps: half as many links in the chain of
# targets that lead back to the picture; the teacher draws as well in 25 steps as in 50
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
GUIDANCE_RANGE = (0.0, 8.0)  # w; diffusers' guidance_scale is w + 1
TARGET_DECAY = 0.95  # of the target network θ⁻
HUBER_C = 1e-3


@dataclasses.dataclass(frozen=True)
class Solver:
    """DDIM over a grid of timesteps with v prediction; all methods take timesteps int64 [B]."""

    alphas_cumprod: Tensor  # float32 [1000]

    @property
    def spacing(self) -> int:
        """Timesteps between neighbours on the grid."""
        return len(self.alphas_cumprod) // NUM_SOLVER_STEPS

    @property
    def last_timestep(self) -> int:
        """Of the grid, where all is noise and drawing begins."""
        return len(self.alphas_cumprod) - 1

    def draw_timesteps(self, rows: int, generator: torch.Generator) -> Tensor:
        """t_{n+k}: grid points 19, 39, ... 999, the timesteps that LCMScheduler also uses."""
        index = torch.randint(1, NUM_SOLVER_STEPS + 1, (rows,), generator=generator)
        return (index * self.spacing - 1).to(self.alphas_cumprod.device)

    def before(self, timesteps: Tensor) -> Tensor:
        """t_n, one solver step earlier; the first steps end at timestep 0."""
        return (timesteps - SKIPPED * self.spacing).clamp(min=0)

    def _signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod[timesteps][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def denoised(self, latents: Tensor, velocity: Tensor, timesteps: Tensor) -> Tensor:
        """x0 = α·z − σ·v."""
        alpha, sigma = self._signal_and_noise(timesteps)
        return alpha * latents - sigma * velocity

    def step(self, latents: Tensor, velocity: Tensor, timesteps: Tensor) -> Tensor:
        """One skipping DDIM step from t_{n+k} to t_n (equation 16 of the paper, η = 0)."""
        alpha, sigma = self._signal_and_noise(timesteps)
        epsilon = alpha * velocity + sigma * latents
        earlier_alpha, earlier_sigma = self._signal_and_noise(self.before(timesteps))
        return earlier_alpha * self.denoised(latents, velocity, timesteps) + earlier_sigma * epsilon

    def consistency(self, latents: Tensor, velocity: Tensor, timesteps: Tensor) -> Tensor:
        """f_θ = c_skip(t)·z + c_out(t)·x0 (equation 9 of the paper)."""
        c_skip, c_out = boundary_scalings(timesteps)
        return c_skip * latents + c_out * self.denoised(latents, velocity, timesteps)


def boundary_scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out, float32 [B, 1, 1, 1]: f is the identity at t = 0."""
    scaled = (timesteps.float() * TIMESTEP_SCALING)[:, None, None, None]
    denominator = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / denominator, scaled / denominator.sqrt()


def draw_guidance(rows: int, generator: torch.Generator) -> Tensor:
    """w, uniform over GUIDANCE_RANGE: float32 [B]."""
    low, high = GUIDANCE_RANGE
    return low + (high - low) * torch.rand(rows, generator=generator)


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Sine and cosine features of 1000·w, float32 [B, width].

    As LatentConsistencyModelPipeline.get_guidance_scale_embedding.
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=guidance.device)
    angles = 1000 * guidance[:, None] * torch.exp(index * -(math.log(10_000.0) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def pseudo_huber(output: Tensor, target: Tensor) -> Tensor:
    """Mean of √((x−y)² + c²) − c: absolute error, smooth at nought."""
    return (((output - target) ** 2 + HUBER_C**2).sqrt() - HUBER_C).mean()
