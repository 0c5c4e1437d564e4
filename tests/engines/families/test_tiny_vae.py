"""A checkpoint whose VAE is an `AutoencoderTiny`, against diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from engines.drawing.runner import Runner
from tests.engines.conftest import BACKENDS
from tests.engines.peers import Peer, assert_agree, draw_together, recipe


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoints / "tiny-sd")
    channels = {f"{part}_block_out_channels": (8, 8, 8, 8) for part in ("encoder", "decoder")}
    pipeline.vae = AutoencoderTiny(**channels, scaling_factor=0.7)
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("vae") / "tiny-taesd")
    return folder


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("size", [(64, 64), (72, 104)], ids=str)
def test_agrees_from_text_and_from_images(
    size: tuple[int, int], runner: Runner, peer: Peer
) -> None:
    """An encoder that samples would draw once more from the generator: other noise ever after."""
    width, height = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    sides = {"width_px": width, "height_px": height}
    recipes = [
        recipe(**sides, guidance_scale=3.0, sampler="ddim"),
        recipe(**sides, image=image, strength=0.6, sampler="ddim", seed=1),
        recipe(**sides, image=image, strength=0.8, sampler="lcm", seed=2),
        recipe(**sides, image=255 - image, strength=0.5, sampler="euler_ancestral", seed=3),
    ]
    for wanted, ours in zip(recipes, draw_together(runner, recipes), strict=True):
        assert_agree(ours, peer.draw(wanted), wanted)
