"""Images and latents against diffusers' own pipelines: same weights, same generators.

Every case is drawn alone and again in one mixed batch with all the others of its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    TCDScheduler,
)

from engines.drawing import Drawing, Recipe
from engines.runner import Runner

SCHEDULERS = {
    "lcm": LCMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "tcd": TCDScheduler,
}
IMAGE = (
    np.add.outer(np.arange(64), np.arange(64))[..., None] * np.array([1, 2, 0.5]) % 256
).astype(np.uint8)
BASE = Recipe(
    prompt="a red star, ünïcode 星", width_px=64, height_px=64, seed=5, num_steps=4,
    guidance_scale=8.5, sampler="lcm",
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """What diffusers draws for a recipe: final latents and pixels."""

    latents: torch.Tensor
    pixels: np.ndarray


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    error = np.mean((ours.astype(float) - theirs.astype(float)) ** 2)
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


def draw_with_diffusers(pipeline_class: Any, checkpoint: Path, recipe: Recipe) -> Peer:
    pipeline = pipeline_class.from_pretrained(checkpoint, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = SCHEDULERS[recipe.sampler].from_config(pipeline.scheduler.config)
    arguments: dict[str, Any] = {
        "prompt": recipe.prompt,
        "num_inference_steps": recipe.num_steps,
        "guidance_scale": recipe.guidance_scale,
    }
    if recipe.negative_prompt:
        arguments["negative_prompt"] = recipe.negative_prompt
    if recipe.eta is not None:
        arguments["eta"] = recipe.eta
    if recipe.image is None:
        arguments |= {"width": recipe.width_px, "height": recipe.height_px}
    else:
        image = torch.from_numpy(recipe.image).permute(2, 0, 1)[None].float() / 255
        arguments |= {"image": image, "strength": recipe.strength}
    results = []
    for output_type in ("latent", "np"):
        generator = torch.Generator().manual_seed(recipe.seed)
        images = pipeline(generator=generator, output_type=output_type, **arguments).images
        results.append(images[0])
    return Peer(results[0], (results[1] * 255).round().astype(np.uint8))


def check(runner: Runner, recipes: list[Recipe], peers: list[Peer]) -> None:
    """Alone and mixed: latents within 1e-3 of the peer's (relative to their scale), PSNR >= 50."""
    alone = [draw_keeping_latents(runner, [recipe])[0] for recipe in recipes]
    mixed = draw_keeping_latents(runner, recipes)
    for recipe, peer, one, many in zip(recipes, peers, alone, mixed, strict=True):
        for latents, pixels in (one, many):
            scale = max(1.0, float(peer.latents.abs().max()))
            assert float((latents - peer.latents).abs().max()) / scale < 1e-3, recipe
            assert psnr(pixels, peer.pixels) >= 50, recipe
        assert psnr(one[1], many[1]) >= 50, recipe


def draw_keeping_latents(
    runner: Runner, recipes: list[Recipe]
) -> list[tuple[torch.Tensor, np.ndarray]]:
    latents: dict[int, torch.Tensor] = {}
    decode = runner.decode

    def keep(drawings: list[Drawing]) -> None:
        for drawing in drawings:
            assert drawing.latents is not None
            latents[id(drawing)] = drawing.latents.clone()
        decode(drawings)

    runner.decode = keep  # type: ignore[method-assign, assignment]
    try:
        drawings = runner.draw(recipes)
    finally:
        del runner.decode  # type: ignore[attr-defined]
    return [(latents[id(drawing)], drawing.pixels) for drawing in drawings]  # type: ignore[misc]


def test_latent_consistency_models(lcm_runner: Runner, lcm_checkpoint: Path) -> None:
    recipes = [
        replace(BASE, num_steps=steps, seed=steps, guidance_scale=1.0 + steps)
        for steps in (1, 2, 3, 5, 8)
    ]
    peers = [
        draw_with_diffusers(LatentConsistencyModelPipeline, lcm_checkpoint, r) for r in recipes
    ]
    check(lcm_runner, recipes, peers)


def test_latent_consistency_image_to_image(lcm_runner: Runner, lcm_checkpoint: Path) -> None:
    recipes = [
        replace(BASE, num_steps=steps, seed=steps, image=IMAGE, strength=strength)
        for steps, strength in ((1, 0.5), (4, 0.8), (8, 1.0))
    ]
    pipeline = LatentConsistencyModelImg2ImgPipeline
    peers = [draw_with_diffusers(pipeline, lcm_checkpoint, recipe) for recipe in recipes]
    check(lcm_runner, recipes, peers)


GUIDED = replace(BASE, guidance_scale=5.0, negative_prompt="blurry")


def test_every_sampler_with_and_without_guidance(sd_runner: Runner, sd_checkpoint: Path) -> None:
    recipes = [
        replace(GUIDED, sampler="ddim", num_steps=8),
        replace(GUIDED, sampler="ddim", num_steps=3, eta=0.5, seed=9),
        replace(GUIDED, sampler="euler", num_steps=6),
        replace(GUIDED, sampler="euler_ancestral", num_steps=5),
        replace(GUIDED, sampler="tcd", num_steps=4, eta=0.3),
        replace(GUIDED, sampler="tcd", num_steps=2, eta=0.0),
        replace(GUIDED, sampler="lcm", num_steps=4),
        replace(BASE, sampler="lcm", num_steps=4, guidance_scale=1.0),
        replace(BASE, sampler="euler", num_steps=7, guidance_scale=1.0),
    ]
    peers = [draw_with_diffusers(StableDiffusionPipeline, sd_checkpoint, r) for r in recipes]
    check(sd_runner, recipes, peers)


def test_image_to_image_with_guidance(sd_runner: Runner, sd_checkpoint: Path) -> None:
    recipes = [
        replace(GUIDED, sampler="ddim", num_steps=8, image=IMAGE, strength=0.6),
        replace(GUIDED, sampler="euler", num_steps=6, image=IMAGE, strength=0.7),
        replace(GUIDED, sampler="euler_ancestral", num_steps=5, image=IMAGE, strength=1.0),
    ]
    pipeline = StableDiffusionImg2ImgPipeline
    peers = [draw_with_diffusers(pipeline, sd_checkpoint, recipe) for recipe in recipes]
    check(sd_runner, recipes, peers)


@pytest.mark.parametrize(("width", "height"), [(64, 96), (128, 48)])
def test_other_shapes(lcm_runner: Runner, lcm_checkpoint: Path, width: int, height: int) -> None:
    recipe = replace(BASE, width_px=width, height_px=height, num_steps=2)
    peer = draw_with_diffusers(LatentConsistencyModelPipeline, lcm_checkpoint, recipe)
    check(lcm_runner, [recipe], [peer])
