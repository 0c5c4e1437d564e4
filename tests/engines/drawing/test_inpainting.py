"""Inpainting agrees with diffusers' own pipeline, and rows with masks share batches with others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.drawing.runner import Runner
from engines.errors import InvalidInput
from engines.families.recipe import Recipe
from tests.engines.conftest import COMBINATIONS
from tests.engines.drawing.test_agreement import RECIPES, _image
from tests.engines.peers import Peer, assert_agree, draw_together, recipe

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
Runners = dict[tuple[str, str], Runner]
SAMPLERS = ("lcm", "ddim", "euler", "euler_ancestral", "tcd", "dpmpp_2m", "dpmpp_2m_sde")


def _mask(width: int = 64, height: int = 64) -> np.ndarray:
    """A blob whose edges are on no latent's."""
    rows, columns = np.mgrid[:height, :width]
    mask: np.ndarray = np.hypot(rows - 0.45 * height, columns - 0.6 * width) < 0.31 * width
    return mask


def masked(num_steps: int, guidance: float, strength: float, **changes: object) -> Recipe:
    return recipe(
        num_steps=num_steps, guidance_scale=guidance, strength=strength, image=_image(num_steps),
        seed=num_steps, mask=_mask(), **changes,
    )  # fmt: skip


LCM = [masked(*each) for each in [(1, 1.0, 1.0), (2, 8.5, 0.5), (4, 3.0, 0.8), (8, 8.5, 1.0)]]
WAYS = [(4, 7.5, 1.0), (5, 1.0, 0.6), (1, 1.0, 1.0), (8, 3.0, 0.999)]
SD = [masked(*WAYS[k % 4], sampler=sampler) for k, sampler in enumerate(SAMPLERS * 2)]
SD += [masked(4, 7.5, 1.0, sampler="ddim", eta=0.5, negative_prompt="dark")]
SD += [masked(6, 1.0, 0.7, sampler="tcd", eta=0.3)]
MASKED = {"tiny-lcm": LCM, "tiny-sd": SD, "tiny-v": SD[::4], "tiny-demo": LCM[::2]}


@pytest.fixture(scope="module")
def peers(checkpoints: Path) -> dict[str, Peer]:
    return {name: Peer(checkpoints / name) for name in MASKED}


@pytest.mark.parametrize(("name", "backend"), COMBINATIONS)
def test_alone(name: str, backend: str, runners: Runners, peers: dict[str, Peer]) -> None:
    for wanted in MASKED[name]:
        (ours,) = draw_together(runners[name, backend], [wanted])
        assert_agree(ours, peers[name].draw(wanted), wanted)


@pytest.mark.parametrize(("name", "backend"), COMBINATIONS)
def test_among_others(name: str, backend: str, runners: Runners, peers: dict[str, Peer]) -> None:
    """With rows from texts and from whole images, of any sampler and step count."""
    mixed = [each for pair in zip(MASKED[name], RECIPES[name], strict=False) for each in pair]
    for first in range(0, len(mixed), 8):
        batch = mixed[first : first + 8]
        for wanted, ours in zip(batch, draw_together(runners[name, backend], batch), strict=True):
            assert_agree(ours, peers[name].draw(wanted), wanted)


@pytest.mark.parametrize(("width", "height"), [(104, 96), (136, 120)])
def test_sides_that_halve_to_odd_ones(
    width: int, height: int, runners: Runners, peers: dict[str, Peer]
) -> None:
    wanted = recipe(
        width_px=width, height_px=height, image=_image(1, 144, 128)[:height, :width],
        mask=_mask(width, height), strength=0.9, num_steps=3, guidance_scale=2.0,
    )  # fmt: skip
    (ours,) = draw_together(runners["tiny-demo", "onnxruntime"], [wanted])
    assert_agree(ours, peers["tiny-demo"].draw(wanted))


def test_an_empty_mask_keeps_the_image_and_a_full_one_nothing(
    runners: Runners, peers: dict[str, Peer]
) -> None:
    nothing, everything = np.zeros((64, 64), bool), np.ones((64, 64), bool)
    for mask in (nothing, everything):
        wanted = recipe(image=_image(4), mask=mask, num_steps=3, strength=1.0)
        (ours,) = draw_together(runners["tiny-sd", "torch"], [wanted])
        assert_agree(ours, peers["tiny-sd"].draw(wanted))


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (None, np.ones((64, 64), bool), "mask is given without an image; send the image too"),
        (_image(1), np.ones((64, 64)), r"mask is float64 \(64, 64\); it must be bool \(64, 64\)"),
        (_image(1), np.ones((64, 72), bool), r"mask is bool \(64, 72\); it must be bool"),
    ],
)
def test_masks_that_fit_no_image(
    image: np.ndarray | None, mask: np.ndarray, message: str, runners: Runners
) -> None:
    with pytest.raises(InvalidInput, match=message):
        runners["tiny-sd", "torch"].start(recipe(image=image, mask=mask))
