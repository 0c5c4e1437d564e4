"""A small classifier of real pictures, whose features the Fréchet distance compares.

It reads all attributes, so its features see whatever makes two sets of pictures differ.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.distill.painter import Pixels, paint
from engines.distill.samples import to_pixels
from engines.distill.text import MEANINGS, labels_of
from engines.distill.training import Course, Draws, Place, train
from engines.distill.world import STYLES, draw_scene

COURSE = Course(num_steps=800, batch_size=32, learning_rate=2e-3, average=0.99)
NUM_FEATURES = 64


class Critic(nn.Module):
    """uint8 pictures of 128 x 128 px to 64 features, and from these to every attribute."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (3, 16, 32, 48, 64)
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 64, NUM_FEATURES))
        self.heads = nn.ModuleDict(
            {k: nn.Linear(NUM_FEATURES, len(v)) for k, v in MEANINGS.items()}
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [B, 3, 128, 128] in -1..1 to features, float32 [B, 64]."""
        features: Tensor = self.body(pixels)
        return features


def train_critic(course: Course, place: Place) -> Critic:
    """Train on painted pictures of both sides of the split and of every style."""
    torch.manual_seed(place.seed)
    critic = Critic().to(place.device)

    def loss_of(draws: Draws) -> Tensor:
        rng = draws.numpy
        scenes = [
            draw_scene(rng, style=STYLES[int(rng.integers(3))], held_out=bool(rng.random() < 0.2))
            for _ in range(course.batch_size)
        ]
        pixels = to_pixels(np.stack([paint(scene) for scene in scenes])).to(place.device)
        with place.autocast():
            features = F.silu(critic(pixels))
            losses = [
                F.cross_entropy(critic.heads[name](features).float(), labels.to(place.device))
                for name, labels in labels_of(scenes).items()
            ]
        return torch.stack(losses).mean()

    train("critic", course, place, list(critic.parameters()), loss_of)
    return critic.eval().requires_grad_(False)


@torch.no_grad()
def features_of(critic: Critic, images: Pixels) -> Tensor:
    """float64 [N, 64] of uint8 [N, 128, 128, 3]."""
    return torch.cat(
        [critic(to_pixels(part)) for part in np.array_split(images, 1 + len(images) // 64)]
    ).double()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """‖μ₁−μ₂‖² + tr(C₁ + C₂ − 2·√(C₁C₂)) of two sets of features (arXiv 1706.08500, equation 6)."""
    difference = one.mean(dim=0) - other.mean(dim=0)
    c1, c2 = one.T.cov(), other.T.cov()
    roots = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
    return float(difference @ difference + c1.trace() + c2.trace() - 2 * roots)
