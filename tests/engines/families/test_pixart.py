"""PixArt-α, δ and Σ agree with diffusers' pipelines, alone and in one batch, at any size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.drawing.runner import Runner
from engines.families.recipe import Recipe
from engines.order import Order
from tests.engines.checkpoints import make_pixart_checkpoint
from tests.engines.peers import Peer, assert_agree, draw_together
from tests.engines.peers import recipe as plain_recipe

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8).repeat(32, 0).repeat(32, 1)
WAYS: list[dict[str, Any]] = [
    {"num_steps": 1},
    {"num_steps": 2, "guidance_scale": 3.0},
    {"num_steps": 3, "guidance_scale": 2.0, "negative_prompt": "a blue ball"},
    {"num_steps": 4, "prompt": "  A Red CUBE\n"},
    {"num_steps": 5, "width_px": 320, "height_px": 192},  # a bin
    {"num_steps": 6, "width_px": 240, "height_px": 272, "guidance_scale": 2.0},  # a bin
    {"num_steps": 7, "width_px": 288, "height_px": 256},  # drawn at 272 x 240
    {"num_steps": 8, "width_px": 128, "height_px": 512, "prompt": "long " * 60},
    {"num_steps": 4, "prompt": "marks </s> in it, and <pad> too", "guidance_scale": 1.5},
    {"num_steps": 2, "prompt": ""},
]
OTHERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "tcd")


def recipe(**changes: Any) -> Recipe:
    return plain_recipe(**({"width_px": 256, "height_px": 256} | changes))


RECIPES = [
    *(recipe(**way, seed=seed) for seed, way in enumerate(WAYS)),
    # Of one step diffusers' pipeline takes what a scheduler calls x₀, whatever its last step gives.
    *(
        recipe(**WAYS[1 + (2 * k + turn) % 7], sampler=sampler, seed=k)
        for k, sampler in enumerate(OTHERS)
        for turn in range(2)
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pixart_checkpoint(tmp_path_factory.mktemp("pixart") / "tiny-pixart")


def open_runner(checkpoint: Path, backend: str, cache_dir: Path) -> Runner:
    return Runner.open(
        Order(str(checkpoint), backend=backend, cache_dir=cache_dir, max_batch=8, num_threads=1)
    )


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def runner(request: pytest.FixtureRequest, folder: Path, cache_dir: Path) -> Iterator[Runner]:
    opened = open_runner(folder, request.param, cache_dir)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def peer(folder: Path) -> Peer:
    return Peer(folder)


def test_alone(runner: Runner, peer: Peer) -> None:
    for wanted in RECIPES:
        (ours,) = draw_together(runner, [wanted])
        assert_agree(ours, peer.draw(wanted), wanted)


def test_mixed_in_one_batch(runner: Runner, peer: Peer) -> None:
    """Samplers, step counts, guidance and sizes of one bin share every call."""
    mixed = [RECIPES[k] for k in np.random.default_rng(1).permutation(len(RECIPES))]
    for first in range(0, len(mixed), 8):
        batch = mixed[first : first + 8]
        for wanted, ours in zip(batch, draw_together(runner, batch), strict=True):
            assert_agree(ours, peer.draw(wanted), wanted)
