"""Agreement with diffusers' own pipelines: same weights, same generators, same numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.drawing.runner import Runner
from engines.families.recipe import Blend, Recipe
from engines.order import Order
from tests.engines.conftest import BACKENDS, COMBINATIONS
from tests.engines.peers import Peer, assert_agree, draw_together, psnr_db, recipe

pytestmark = pytest.mark.filterwarnings(
    # diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2.4 deprecates.
    "ignore:__array__ implementation:DeprecationWarning",
)
Runners = dict[tuple[str, str], Runner]


@pytest.fixture(scope="module")
def peers(checkpoints: Path) -> dict[str, Peer]:
    return {
        name: Peer(checkpoints / name) for name in ("tiny-lcm", "tiny-sd", "tiny-v", "tiny-demo")
    }


def _image(seed: int, width: int = 64, height: int = 64) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3))
    return coarse.repeat(16, 0).repeat(16, 1).astype(np.uint8)


LCM = [recipe(num_steps=n, seed=n, guidance_scale=8.5) for n in range(1, 9)]
LCM += [
    recipe(num_steps=n, seed=n, guidance_scale=w, image=_image(n), strength=s)
    for n, w, s in [(1, 1.0, 0.3), (2, 8.5, 0.5), (4, 3.0, 0.8), (8, 8.5, 1.0)]
]
SD = [
    recipe(sampler=sampler, num_steps=n, seed=n, guidance_scale=w, negative_prompt=negative)
    for sampler in ("ddim", "euler", "euler_ancestral", "tcd", "lcm", "dpmpp_2m", "dpmpp_2m_sde")
    for n, w, negative in [
        (1, 1.0, ""), (2, 7.5, "blurry"), (3, 1.5, ""), (4, 1.0, ""), (5, 7.5, "a blue ball"),
        (6, 1.0, ""), (7, 4.0, "dark"), (8, 7.5, "blurry"),
    ]
]  # fmt: skip
SD += [
    recipe(sampler="ddim", num_steps=4, eta=0.5, guidance_scale=3.0),
    recipe(sampler="ddim", num_steps=3, eta=1.0),
    recipe(sampler="tcd", num_steps=4, eta=0.3),
    recipe(sampler="tcd", num_steps=8, eta=1.0, guidance_scale=2.0),
]
SD_IMAGES = [
    recipe(sampler=sampler, num_steps=n, image=_image(n), strength=s, guidance_scale=w)
    for sampler in ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")
    for n, s, w in [(4, 0.5, 1.0), (8, 0.75, 7.5)]
]
# LCM-LoRA's and TCD's image-to-image over a plain checkpoint: strength drops steps there. TCD over
# a guidance embedding has no peer: diffusers' LCM pipelines hand TCDScheduler no eta.
SD_IMAGES += [
    recipe(sampler=sampler, num_steps=n, image=_image(n), strength=s, guidance_scale=w, eta=eta)
    for sampler, eta in (("lcm", 0.0), ("tcd", 0.0), ("tcd", 0.3))
    for n, s, w in [(1, 1.0, 1.0), (4, 0.5, 1.0), (8, 0.75, 7.5)]
]
NAMED = [
    recipe(sampler=sampler, num_steps=len(timesteps), guidance_scale=w, eta=eta,
           timesteps=timesteps)
    for sampler, eta in (("lcm", 0.0), ("euler", 0.0), ("tcd", 0.3), ("dpmpp_2m", 0.0),
                         ("dpmpp_2m_sde", 0.0))
    for timesteps, w in [((999, 749, 499, 249), 1.0), ((800,), 0.0), ((900, 431, 7), 7.5)]
]  # fmt: skip
NAMED += [
    dataclasses.replace(each, image=_image(4), strength=0.5) for each in NAMED if each.num_steps > 3
]
RECIPES: dict[str, list[Recipe]] = {
    "tiny-lcm": LCM + [each for each in NAMED if each.sampler == "lcm"],
    "tiny-sd": SD + SD_IMAGES + NAMED,
    "tiny-v": [r for r in SD if r.num_steps in (1, 4, 7)] + SD_IMAGES,
    "tiny-demo": LCM,
}


@pytest.mark.parametrize(("name", "backend"), COMBINATIONS)
def test_alone(name: str, backend: str, runners: Runners, peers: dict[str, Peer]) -> None:
    for wanted in RECIPES[name]:
        (ours,) = draw_together(runners[name, backend], [wanted])
        assert_agree(ours, peers[name].draw(wanted), wanted)


@pytest.mark.parametrize(("name", "backend"), COMBINATIONS)
def test_mixed_in_one_batch(
    name: str, backend: str, runners: Runners, peers: dict[str, Peer]
) -> None:
    """Different samplers, step counts, guidance and strengths share every call."""
    order = np.random.default_rng(0).permutation(len(RECIPES[name]))
    mixed = [RECIPES[name][k] for k in order]
    for first in range(0, len(mixed), 8):
        batch = mixed[first : first + 8]
        for wanted, ours in zip(batch, draw_together(runners[name, backend], batch), strict=True):
            assert_agree(ours, peers[name].draw(wanted), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "width", "height"),
    [
        ("tiny-lcm", 96, 64), ("tiny-lcm", 64, 128), ("tiny-lcm", 72, 104),
        # 13 x 12 and 17 x 15 latents, and both bounds of the range
        ("tiny-demo", 104, 96), ("tiny-demo", 136, 120), ("tiny-demo", 64, 256),
    ],
)  # fmt: skip
def test_other_sizes(
    name: str, width: int, height: int, backend: str, runners: Runners, peers: dict[str, Peer]
) -> None:
    """Every multiple of 8 px, sides that halve to odd ones too; from text and from an image."""
    size = {"width_px": width, "height_px": height}
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    for wanted in (
        recipe(**size, guidance_scale=8.5),
        recipe(**size, guidance_scale=2.0, num_steps=2, image=image, strength=0.6),
    ):
        (ours,) = draw_together(runners[name, backend], [wanted])
        assert ours.pixels.shape == (height, width, 3)
        assert_agree(ours, peers[name].draw(wanted), wanted)


@pytest.mark.parametrize("prompt", ["", "日本の城 🏯", "a\u0301 zero\u200bwidth", "word " * 200])
def test_any_prompt(prompt: str, runners: Runners, peers: dict[str, Peer]) -> None:
    """Unicode, nothing, and more than the window holds: the same tokens as diffusers."""
    wanted = recipe(prompt=prompt, guidance_scale=8.5, num_steps=2)
    (ours,) = draw_together(runners["tiny-lcm", "onnxruntime"], [wanted])
    assert_agree(ours, peers["tiny-lcm"].draw(wanted), prompt)


@pytest.mark.parametrize("name", ["tiny-lcm", "tiny-sd"])
def test_a_prompt_on_its_way_to_others(name: str, runners: Runners, peers: dict[str, Peer]) -> None:
    """Embeddings moved as diffusers moves them, beside rows that stay; the second time cached."""
    plain = recipe(guidance_scale=7.5, negative_prompt="dark", num_steps=2)
    blends = [(Blend("a blue ball", share),) for share in (0.0, 0.3, 1.0)]
    blends.append((Blend("a blue ball", 0.3), Blend("at night", 0.6)))
    moved = [dataclasses.replace(plain, blends=each) for each in blends]
    runner = runners[name, "onnxruntime"]
    for _ in range(2):
        for wanted, ours in zip(
            [plain, *moved], draw_together(runner, [plain, *moved]), strict=True
        ):
            assert_agree(ours, peers[name].draw(wanted), wanted.blends)
    known = runner.start(moved[-1])
    assert known.text_encoded, "no text is encoded twice"
    arrived = dataclasses.replace(plain, prompt="a blue ball")
    assert_agree(draw_together(runner, [arrived])[0], peers[name].draw(moved[2]))


def test_rows_ignore_their_neighbours(runners: Runners) -> None:
    runner = runners["tiny-sd", "onnxruntime"]
    wanted = recipe(sampler="euler_ancestral", guidance_scale=7.5, negative_prompt="dark")
    (alone,) = draw_together(runner, [wanted])
    others = [recipe(sampler="tcd", seed=k, num_steps=k, eta=0.3) for k in range(1, 8)]
    mixed = draw_together(runner, [*others[:4], wanted, *others[4:]])[4]
    assert psnr_db(alone.pixels, mixed.pixels) >= 50.0
    assert np.abs(alone.latents - mixed.latents).max() <= 1e-3


def test_a_row_may_join_between_steps(runners: Runners) -> None:
    """What continuous batching does: a row enters while another is half done."""
    runner = runners["tiny-lcm", "torch"]
    early, late = recipe(num_steps=8, seed=1), recipe(num_steps=2, seed=2)
    expected = [draw_together(runner, [wanted])[0] for wanted in (early, late)]
    rows = [runner.start(early), runner.start(late)]
    runner.encode_text(rows)
    for _ in range(5):
        runner.denoise(rows[:1])
    runner.denoise(rows)
    runner.denoise(rows)
    runner.decode(rows[1:])
    runner.denoise(rows[:1])
    runner.decode(rows[:1])
    for row, wanted in zip(rows, expected, strict=True):
        assert row.pixels is not None
        assert psnr_db(row.pixels, wanted.pixels) >= 50.0


def test_backends_agree_in_half_precision(checkpoints: Path, cache_dir: Path) -> None:
    """fp16 graphs export without a GPU; ONNX Runtime runs them near the fp32 result."""
    half = Runner.open(Order(
        str(checkpoints / "tiny-lcm"), backend="onnxruntime", precision="fp16",
        cache_dir=cache_dir, num_threads=1,
    ))  # fmt: skip
    full = Runner.open(
        Order(
            str(checkpoints / "tiny-lcm"), backend="onnxruntime", cache_dir=cache_dir, num_threads=1
        )
    )
    wanted = recipe(guidance_scale=8.5)
    (a,), (b,) = draw_together(half, [wanted]), draw_together(full, [wanted])
    assert np.abs(a.latents - b.latents).max() <= 0.1
    assert psnr_db(a.pixels, b.pixels) >= 30.0
    assert half.info.precision == "fp16"
    half.close()
    full.close()


def test_previews_are_the_denoised_guess(runners: Runners) -> None:
    runner = runners["tiny-lcm", "onnxruntime"]
    wanted = recipe(num_steps=4, num_previews=2)
    (drawing,) = runner.draw([wanted])
    assert [preview.shape for preview in drawing.previews] == [(64, 64, 3)] * 2
    (plain,) = runner.draw([recipe(num_steps=4)])
    assert plain.pixels is not None
    assert drawing.pixels is not None
    assert psnr_db(plain.pixels, drawing.pixels) == float("inf")
    assert drawing.latents is None  # nothing large outlives the pixels
    assert isinstance(drawing.generator, torch.Generator)
