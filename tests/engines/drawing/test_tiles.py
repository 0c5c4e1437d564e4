"""Decoding in tiles, one a call: equal to diffusers' `tiled_decode`, in whatever company."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engines.drawing.canvas import Canvas
from engines.drawing.decoding import Decoding
from engines.drawing.drawing import Drawing
from engines.drawing.model import load_model
from engines.drawing.runner import Runner
from engines.drawing.stage import Stage
from engines.errors import InvalidInput, OutOfMemory
from engines.families.tiles import Grid, grid_of
from engines.order import Order
from tests.engines.checkpoints import make_tiny_vae
from tests.engines.conftest import BACKENDS
from tests.engines.peers import Result, draw_together, psnr_db, recipe

TILE_PX = 64  # what diffusers' `enable_vae_tiling` takes of a VAE whose sample_size is 64
MIN_PSNR_DB = 60.0
SIZES = [(128, 128), (72, 104), (64, 72), (128, 48)]  # latents of 13 and 9 leave tiles of one


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny-vae")


@pytest.fixture(scope="module", params=BACKENDS)
def runner(
    request: pytest.FixtureRequest, checkpoints: Path, cache_dir: Path, tiny_vae: Path
) -> Iterator[Runner]:
    order = Order(
        str(checkpoints / "tiny-sd"), request.param, cache_dir=cache_dir, num_threads=1,
        max_batch=8, tiny_vae=str(tiny_vae), vae_tiling_px=TILE_PX,
    )  # fmt: skip
    runner = Runner.open(order)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def peer(checkpoints: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoints / "tiny-sd")
    pipeline.vae.enable_tiling()
    assert pipeline.vae.tile_sample_min_size == TILE_PX
    return pipeline


def tiled(peer: StableDiffusionPipeline, latents: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, 3]`` as diffusers decodes latents ``[C, h, w]``."""
    with torch.inference_mode():
        scaled = torch.from_numpy(latents)[None] / peer.vae.config.scaling_factor
        decoded = peer.vae.decode(scaled).sample
    return np.asarray(VaeImageProcessor().postprocess(decoded, output_type="pil")[0])


def of_size(size: tuple[int, int], **changes: Any) -> Any:
    return recipe(width_px=size[0], height_px=size[1], num_steps=2, sampler="ddim", **changes)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_diffusers(
    size: tuple[int, int], runner: Runner, peer: StableDiffusionPipeline
) -> None:
    (ours,) = draw_together(runner, [of_size(size)])
    assert psnr_db(ours.pixels, tiled(peer, ours.latents)) >= MIN_PSNR_DB


def test_tiles_are_seen(runner: Runner, peer: StableDiffusionPipeline) -> None:
    """Else the other tests could not fail: norms and attention tell a tile from the whole."""
    (ours,) = draw_together(runner, [of_size((128, 128))])
    peer.vae.disable_tiling()
    whole = tiled(peer, ours.latents)
    peer.vae.enable_tiling()
    assert psnr_db(ours.pixels, whole) < 40


def test_tiles_share_calls_with_whole_rows(
    runner: Runner, peer: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[Decoding]] = []
    decode = Runner.decode

    def noted(self: Runner, drawings: list[Drawing]) -> None:
        calls.append([drawing.decoding for drawing in drawings])
        decode(self, drawings)

    monkeypatch.setattr(Runner, "decode", noted)
    mixed = [of_size((128, 128)), of_size((64, 64), seed=4), of_size((104, 72), seed=5)]
    for wanted, ours in zip(mixed, draw_together(runner, mixed), strict=True):
        assert psnr_db(ours.pixels, tiled(peer, ours.latents)) >= MIN_PSNR_DB, wanted
        (alone,) = draw_together(runner, [wanted])
        assert psnr_db(alone.pixels, ours.pixels) >= MIN_PSNR_DB
    assert calls[0] == [Decoding("full", (4, 8, 8))] * 3
    assert all(len(set(call)) == 1 for call in calls)


def test_previews_and_the_tiny_decoder_are_in_tiles_too(
    runner: Runner, peer: StableDiffusionPipeline, tiny_vae: Path
) -> None:
    row = runner.start(of_size((128, 128), num_previews=1))
    runner.encode_text([row])
    runner.denoise([row])
    assert row.decoding == Decoding("tiny", (4, 8, 8))
    num_calls = 0
    while row.stage is Stage.PREVIEW:
        runner.decode([row])
        num_calls += 1
    assert num_calls == 9
    assert [preview.shape for preview in row.previews] == [(128, 128, 3)]
    assert row.denoised is not None
    expected = _tiled_tiny(runner, row.denoised, tiny_vae)
    assert psnr_db(row.previews[0], expected) >= MIN_PSNR_DB


def _tiled_tiny(runner: Runner, latents: Tensor, tiny_vae: Path) -> np.ndarray:
    """By diffusers' own tiles and blending, round a tiny decoder."""
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny.from_pretrained(tiny_vae)
    vae = _around(lambda z: tiny.decode(z / tiny.config.scaling_factor).sample, TILE_PX, 8)
    with torch.inference_mode():
        decoded = vae.tiled_decode(latents[None]).sample
    return np.asarray(VaeImageProcessor().postprocess(decoded, output_type="pil")[0])


def _around(decode: Any, tile_px: int, scale: int) -> AutoencoderKL:
    """diffusers' tiles and blending with another decoder in them."""

    class Decoder(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return decode(latents)  # type: ignore[no-any-return]

    vae = AutoencoderKL(block_out_channels=(32,), use_post_quant_conv=False, latent_channels=4)
    vae.decoder = Decoder()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile_px, tile_px // scale
    return vae


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    side=st.sampled_from([4, 8, 12, 20]),
    scale=st.sampled_from([1, 2, 8]),
)
def test_any_grid_blends_as_diffusers(rows: int, columns: int, side: int, scale: int) -> None:
    """With a decoder to which every tile is another, so that each blend shows."""
    latents = torch.randn(4, rows, columns, generator=torch.Generator().manual_seed(rows))

    def decode(tile: Tensor) -> Tensor:
        large = tile[:, :3].repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        return large * 0.3 + tile.mean()

    grid = grid_of(rows, columns, side * scale, scale)
    if grid is None:
        assert max(rows, columns) <= side
        return
    canvas = Canvas(grid)
    while not canvas.done:
        down, across = grid.box(canvas.index)
        blended = canvas.blend(decode(latents[None, :, down, across])[0].permute(1, 2, 0))
        canvas.put(blended, blended.pixels.numpy())
    expected = _around(decode, side * scale, scale).tiled_decode(latents[None]).sample
    theirs = np.asarray(VaeImageProcessor().postprocess(expected, output_type="pil")[0])
    assert canvas.pixels.shape == theirs.shape
    assert np.abs(canvas.pixels.astype(int) - theirs.astype(int)).max() <= 1


def test_no_more_is_kept_than_is_still_needed() -> None:
    """Of 2048 px squared: the picture in bytes, a line of strips and one more."""
    grid = Grid(256, 256, 64, 8)
    canvas = Canvas(grid)
    while not canvas.done:
        height, width = (8 * side for side in grid.shape(canvas.index))
        blended = canvas.blend(torch.zeros(height, width, 3))
        canvas.put(blended, blended.pixels.numpy())
    kept = [*canvas._bottoms.values(), canvas._right]
    num_bytes = sum(t.untyped_storage().nbytes() for t in kept if t is not None)
    assert canvas.pixels.nbytes == 3 * 2048**2
    assert num_bytes < 6 * 128 * 512 * 3 * 4 + 512 * 128 * 3 * 4


def test_without_memory_for_a_blend_nothing_has_changed(
    runner: Runner, peer: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [runner.start(of_size((128, 128), seed=seed)) for seed in (1, 2)]
    runner.encode_text(rows)
    while rows[0].stage is Stage.DENOISE:
        runner.denoise(rows)
    latents = [row.latents.numpy().copy() for row in rows if row.latents is not None]
    blend, left = Canvas.blend, [0, 0, 0, 1]

    def failing(self: Canvas, tile: Tensor) -> Any:
        if left and left.pop(0):
            raise MemoryError
        return blend(self, tile)

    monkeypatch.setattr(Canvas, "blend", failing)
    runner.decode(rows)
    with pytest.raises(OutOfMemory):
        runner.decode(rows)
    assert [row.tile_index for row in rows] == [1, 1]
    for row in rows:
        while row.stage is Stage.DECODE:
            runner.decode([row])
    for row, of_row in zip(rows, latents, strict=True):
        assert row.pixels is not None
        assert psnr_db(row.pixels, tiled(peer, of_row)) >= MIN_PSNR_DB


def test_a_tile_that_overflows_ends_the_row(runner: Runner) -> None:
    row = runner.start(of_size((128, 128)))
    runner.encode_text([row])
    while row.stage is Stage.DENOISE:
        runner.denoise([row])
    assert row.latents is not None
    row.latents = row.latents.clone()
    row.latents[0, 0, -1] = torch.nan  # in the third tile
    num_calls = 0
    while row.stage is Stage.DECODE:
        runner.decode([row])
        num_calls += 1
    assert num_calls == 3
    assert row.failure is not None
    assert "not all finite" in row.failure
    assert row.canvas is None


def test_warming_up_decodes_all_tiles(checkpoints: Path) -> None:
    order = Order(str(checkpoints / "tiny-sd"), "torch", vae_tiling_px=32)
    runner = Runner(load_model(order, lambda *_: None), max_batch=2)
    runner.warm_up()
    (drawn,) = draw_together(runner, [of_size((64, 64))])
    assert isinstance(drawn, Result)
    runner.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vae", [None, "folder", "pipeline", "file"])
def test_a_tile_of_parts_of_latents_is_refused_before_anything_is_built(
    backend: str, vae: str | None, checkpoints: Path, tmp_path: Path
) -> None:
    folder = checkpoints / "tiny-sd"
    places = {"folder": folder / "vae", "pipeline": folder}
    places["file"] = folder / "vae" / "diffusion_pytorch_model.safetensors"
    order = Order(
        str(folder), backend, cache_dir=tmp_path, vae_tiling_px=72,
        vae=str(places[vae]) if vae else None,
    )  # fmt: skip
    built: list[str] = []
    with pytest.raises(InvalidInput, match="--vae-tiling-px is 72; it must be a multiple of 32"):
        Runner.open(order, progress=lambda what, *_: built.append(what))
    assert not built
