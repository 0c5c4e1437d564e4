"""AnimateDiff agrees with diffusers' pipeline, alone and in batches; clips come in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from engines.cli import app
from engines.drawing.decoding import Decoding
from engines.drawing.drawing import Drawing
from engines.drawing.model import load_model, prepare
from engines.drawing.parity import compare
from engines.drawing.runner import Runner
from engines.drawing.stage import Stage
from engines.errors import InvalidInput
from engines.families.recipe import Recipe
from engines.order import Order
from tests.engines.checkpoints import make_lora, make_tiny_vae
from tests.engines.peers import (
    Peer,
    assert_agree,
    assert_alone,
    draw_together,
    open_runner,
    psnr_db,
)
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
def checkpoint(tiny_clips: Path) -> Path:
    return tiny_clips


def test_alone(runner: Runner, peer: Peer) -> None:
    assert_alone(runner, peer, RECIPES)


def test_mixed_in_one_batch(runner: Runner, peer: Peer) -> None:
    """Samplers, step counts and guidance share every call; other lengths group apart."""
    mixed = [RECIPES[k] for k in np.random.default_rng(1).permutation(len(RECIPES))]
    assert len({runner.start(each).group for each in mixed}) == 4
    for wanted, ours in zip(mixed, draw_together(runner, mixed), strict=True):
        assert_agree(ours, peer.draw(wanted), wanted)


def test_a_call_is_as_full_of_short_clips_as_of_pictures(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each frame counts as a picture does; a clip that is more than a call goes alone."""
    calls: list[list[int]] = []
    plain = Runner.denoise

    def denoise(self: Runner, drawings: Sequence[Drawing], *more: Any) -> None:
        calls.append([drawing.num_pictures for drawing in drawings])
        plain(self, drawings, *more)

    monkeypatch.setattr(Runner, "denoise", denoise)
    most = runner.info.max_batch
    short = recipe(num_steps=1, num_frames=most // 4)
    runner.draw([short] * 5)
    assert calls == [[most // 4] * 4, [most // 4]]
    calls.clear()
    long = recipe(num_steps=1, num_frames=most, guidance_scale=2.0)
    runner.draw([long, long])
    assert calls == [[2 * most]] * 2


def test_frames_know_of_each_other(runner: Runner) -> None:
    """Else the agreement above would hold without motion modules."""
    wanted = recipe(num_steps=1)
    row = runner.start(wanted)
    runner.encode_text([row])
    changed = dataclasses.replace(row, latents=row.latents.clone())  # type: ignore[union-attr]
    assert changed.latents is not None
    changed.latents[:, -1] = 0.0
    runner.denoise([row])
    runner.denoise([changed])
    assert row.latents is not None
    assert (row.latents[:, 0] - changed.latents[:, 0]).abs().max() > 1e-3


def test_what_it_says_of_itself(runner: Runner) -> None:
    info = runner.info
    assert (info.default_num_frames, info.max_num_frames, info.frames_per_second) == (8, 8, 8)
    assert (info.default_sampler, info.default_num_steps) == ("lcm", 6)
    assert info.default_guidance_scale == 1.5
    assert runner.default_recipe(0).num_frames == 8


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[list[Decoding]]:
    """Of each decode from now on, what its rows have in common."""
    calls: list[list[Decoding]] = []
    decode = Runner.decode

    def noted(self: Runner, drawings: list[Drawing]) -> None:
        calls.append([drawing.decoding for drawing in drawings])
        decode(self, drawings)

    monkeypatch.setattr(Runner, "decode", noted)
    return calls


def test_a_decode_takes_a_few_frames(
    runner: Runner, peer: Peer, decodings: list[list[Decoding]]
) -> None:
    """As many as pictures; what is left of two clips may go together."""
    pair, last = Decoding("full", (4, 8, 8), 2), Decoding("full", (4, 8, 8), 1)
    assert runner.info.max_decode_batch == 2
    assert [runner.rows_that_fit(each) for each in (pair, last)] == [1, 512]
    wanted = [RECIPES[4], RECIPES[6]]
    runner.draw(wanted[:1])
    assert decodings == [[pair], [pair], [last]]
    rows = [runner.start(each) for each in wanted]
    runner.encode_text(rows)
    for row in rows:
        while row.stage is Stage.DENOISE:
            runner.denoise([row])
        while row.decoding == pair:
            runner.decode([row])
    runner.decode(rows)
    assert decodings[-1] == [last, last]
    for row, each in zip(rows, wanted, strict=True):
        assert row.pixels is not None
        assert psnr_db(row.pixels, peer.draw(each).pixels) >= 50.0
        assert row.canvas is row.latents is None


def test_a_preview_is_a_clip(runner: Runner, decodings: list[list[Decoding]]) -> None:
    row = runner.start(recipe(num_steps=2, num_previews=1))
    runner.encode_text([row])
    runner.denoise([row])
    assert row.denoised is not None
    guess = row.denoised.clone()
    while row.stage is Stage.PREVIEW:
        runner.decode([row])
    assert len(decodings) == 3
    finished = dataclasses.replace(row, latents=guess, step_index=2)
    while finished.stage is Stage.DECODE:
        runner.decode([finished])
    assert np.array_equal(row.previews[0], finished.pixels)


def test_tiles_of_frames(tiny_clips: Path, cache_dir: Path, tmp_path: Path) -> None:
    """As diffusers tiles each frame; by the tiny decoder too nothing is missing."""
    tiny = make_tiny_vae(tmp_path / "tiny-vae")
    tiling = open_runner(tiny_clips, "torch", cache_dir, vae_tiling_px=64, tiny_vae=str(tiny))
    wanted = recipe(num_steps=1, num_frames=3, width_px=104, height_px=128)
    (ours,) = draw_together(tiling, [wanted])
    peer = AnimateDiffPipeline.from_pretrained(tiny_clips)
    peer.vae.enable_tiling()
    with torch.inference_mode():
        decoded = peer.decode_latents(torch.from_numpy(ours.latents)[None])
    frames = peer.video_processor.postprocess_video(decoded, output_type="pil")[0]
    assert psnr_db(ours.pixels, np.stack([np.asarray(frame) for frame in frames])) >= 60.0
    (by_tiny,) = draw_together(tiling, [dataclasses.replace(wanted, decoder="tiny")])
    assert by_tiny.pixels.shape == ours.pixels.shape
    tiling.warm_up()
    tiling.close()


# One of pictures names layers that are in motion modules too, and has nothing for these.
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
def test_loras(tiny_clips: Path, checkpoints: Path, cache_dir: Path, tmp_path: Path) -> None:
    """One of pictures, and one that changes motion modules too, each and together."""
    loras = {
        "style": make_lora(checkpoints / "tiny-sd", tmp_path / "style", ["to_q", "to_v"]),
        "motion": make_lora(tiny_clips, tmp_path / "motion", ["to_k", "to_out.0", "ff.net.2"]),
    }
    state = load_file(loras["motion"] / "pytorch_lora_weights.safetensors")
    assert any(".motion_modules." in key for key in state)
    with_loras = open_runner(tiny_clips, "torch", cache_dir, loras=loras)
    theirs = Peer(tiny_clips, loras=loras)
    for chosen in ({"style": 0.8}, {"motion": 1.0}, {"style": 0.5, "motion": 0.7}, {}):
        wanted = recipe(num_steps=2, num_frames=3, loras=chosen)
        (ours,) = draw_together(with_loras, [wanted])
        assert_agree(ours, theirs.draw(wanted), wanted)
    with_loras.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 9}, "num_frames is 9; it must be from 1 to 8"),
        ({"num_frames": 0}, "num_frames is 0; it must be from 1 to 8"),
        (
            {"image": np.zeros((64, 64, 3), np.uint8)},
            "image is given; tiny-animatediff draws clips from text alone, leave it out",
        ),
    ],
    ids=["too many", "none", "image"],
)
def test_refused(change: dict[str, Any], message: str, runner: Runner) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        runner.start(recipe(**change))
    assert refused.value.field == next(iter(change))


def test_pictures_have_no_frames(checkpoints: Path, cache_dir: Path) -> None:
    pictures = open_runner(checkpoints / "tiny-sd", "torch", cache_dir)
    info = pictures.info
    assert (info.default_num_frames, info.max_num_frames, info.frames_per_second) == (1, 1, 0)
    message = "num_frames is 2; tiny-sd draws pictures, leave it out"
    with pytest.raises(InvalidInput, match=message):
        pictures.start(recipe(num_frames=2))
    pictures.close()


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_from_the_command_line(ending: str, tiny_clips: Path, tmp_path: Path) -> None:
    out = tmp_path / f"clip.{ending}"
    command = ["generate", "a cube", "-o", str(out), "--model", str(tiny_clips)]
    command += ["--engine", "torch", "--num-frames", "3", "--steps", "1"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with Image.open(out) as clip:
        assert (clip.size, clip.n_frames) == ((64, 64), 3)  # type: ignore[attr-defined]
        clip.load()
        assert clip.info["duration"] == {"webp": 125, "gif": 120}[ending]
    command[3] = str(tmp_path / "clip.png")
    with pytest.raises(InvalidInput, match=r"the model draws clips, name it \.webp or \.gif"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_bundle_with_an_adapter(
    tiny_motion: Path, checkpoints: Path, peer: Peer, cache_dir: Path
) -> None:
    """One graph for every length, size and batch, of a checkpoint of pictures."""
    order = Order(
        str(checkpoints / "tiny-sd"), "onnxruntime", cache_dir=cache_dir, max_batch=8,
        num_threads=1, motion_adapter=str(tiny_motion),
    )  # fmt: skip
    bundle = prepare(order, lambda *_: None)
    assert bundle.manifest["beside"]["motion_adapter"]["name"] == "tiny-motion"
    assert not bundle.part("vae_encoder").exists()
    built = Runner.open(order)
    assert built.info.components == {"motion_adapter": "tiny-motion"}
    assert built.info.max_num_frames == 8
    for wanted, ours in zip(RECIPES, draw_together(built, RECIPES), strict=True):
        assert_agree(ours, peer.draw(wanted), wanted)
    (alone,) = draw_together(built, RECIPES[5:6])
    assert_agree(alone, peer.draw(RECIPES[5]))
    built.close()


def test_verify_compares_clips(tiny_clips: Path) -> None:
    model = load_model(Order(str(tiny_clips), "torch"), lambda *_: None)
    short = dataclasses.replace(model.facts, default_num_frames=2)
    found = compare(dataclasses.replace(model, facts=short), model, ["a cube"])
    assert {each.part for each in found} == {"text_encoder", "denoiser", "vae_decoder"}
    assert all(each.good for each in found)
