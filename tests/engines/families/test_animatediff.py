"""AnimateDiff agrees with diffusers' pipeline, alone and in batches; clips are decoded in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.drawing.runner import Runner
from engines.families.recipe import Recipe
from engines.order import Order
from tests.engines.checkpoints import make_animatediff_checkpoint, make_motion_adapter
from tests.engines.peers import Peer, assert_agree, draw_together
from tests.engines.peers import recipe as plain_recipe

NUM_FRAMES = 5
WAYS: list[dict[str, Any]] = [
    {"num_steps": 1},
    {"num_steps": 2, "guidance_scale": 1.5},
    {"num_steps": 3, "num_frames": 1, "guidance_scale": 2.0, "negative_prompt": "a blue ball"},
    {"num_steps": 4, "num_frames": 8},
    {"num_steps": 6, "guidance_scale": 1.5, "negative_prompt": "dark"},
    {"num_steps": 8, "width_px": 72, "height_px": 104, "num_frames": 2},
    {"num_steps": 4, "sampler": "ddim", "guidance_scale": 7.5},
    {"num_steps": 7, "sampler": "ddim", "eta": 0.5},
    {"num_steps": 5, "sampler": "euler_ancestral", "guidance_scale": 3.0},
    {"num_steps": 3, "sampler": "dpmpp_2m", "prompt": ""},
]


def recipe(**changes: Any) -> Recipe:
    return plain_recipe(**({"num_frames": NUM_FRAMES} | changes))


RECIPES = [recipe(**way, seed=seed) for seed, way in enumerate(WAYS)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_motion_adapter(tmp_path_factory.mktemp("motion") / "tiny-motion")


@pytest.fixture(scope="module")
def folder(checkpoints: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("animatediff") / "tiny-animatediff"
    return make_animatediff_checkpoint(made, checkpoints / "tiny-sd", adapter)


def open_runner(checkpoint: Path, backend: str, cache_dir: Path, **more: Any) -> Runner:
    order = Order(str(checkpoint), backend=backend, cache_dir=cache_dir, max_batch=8, num_threads=1)
    return Runner.open(dataclasses.replace(order, **more))


@pytest.fixture(scope="module")
def runner(folder: Path, cache_dir: Path) -> Iterator[Runner]:
    opened = open_runner(folder, "torch", cache_dir)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def peer(folder: Path) -> Peer:
    return Peer(folder)


def test_alone(runner: Runner, peer: Peer) -> None:
    for wanted in RECIPES:
        (ours,) = draw_together(runner, [wanted])
        assert ours.pixels.shape == (wanted.num_frames, wanted.height_px, wanted.width_px, 3)
        assert_agree(ours, peer.draw(wanted), wanted)


def test_mixed_in_one_batch(runner: Runner, peer: Peer) -> None:
    """Samplers, step counts and guidance share every call; other lengths have calls of their own."""
    mixed = [RECIPES[k] for k in np.random.default_rng(1).permutation(len(RECIPES))]
    for wanted, ours in zip(mixed, draw_together(runner, mixed), strict=True):
        assert_agree(ours, peer.draw(wanted), wanted)
