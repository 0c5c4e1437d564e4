"""A tiny VAE beside the model's own: chosen by the row, both ways, equal to diffusers', in shared
batches.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from engines.backends.engine import Engine
from engines.build.bundle import MANIFEST, Blueprint, build_bundle
from engines.build.checkpoint import load_pipeline
from engines.build.source import Overrides, find
from engines.cli import app
from engines.drawing.model import load_model
from engines.drawing.runner import Runner
from engines.drawing.stage import Stage
from engines.errors import CheckpointError, InvalidInput
from engines.facts import Defaults
from engines.order import Order
from tests.engines.checkpoints import make_tiny_vae
from tests.engines.conftest import BACKENDS
from tests.engines.drawing.test_agreement import _image
from tests.engines.drawing.test_inpainting import masked
from tests.engines.peers import MIN_PSNR_DB, Peer, assert_agree, draw_together, psnr_db, recipe

Calls = list[tuple[str, int]]  # the part and the rows of each
WEIGHTS = "diffusion_pytorch_model.safetensors"
MIXED = [
    recipe(decoder="tiny", num_steps=3),
    recipe(decoder="full", num_steps=3, seed=4, sampler="ddim", guidance_scale=3.0),
    recipe(decoder="tiny", num_steps=3, seed=5, image=_image(1), strength=1.0),
    recipe(decoder="full", num_steps=3, seed=6, image=_image(2), strength=1.0),
]
PICTURED = [  # by the tiny one: from an image, and what a mask marks of one
    recipe(decoder="tiny", num_steps=4, seed=7, image=_image(3), strength=0.5),
    masked(4, 3.0, 0.8, decoder="tiny"),
    masked(3, 1.0, 1.0, decoder="tiny", sampler="ddim", eta=0.4),
]


class _Noted:
    """An engine that notes its calls."""

    def __init__(self, part: str, engine: Engine, calls: Calls) -> None:
        self._part, self._engine, self._calls = part, engine, calls
        self.weight, self.refit, self.close = engine.weight, engine.refit, engine.close

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._calls.append((self._part, len(next(iter(inputs.values())))))
        return self._engine.run(inputs)


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny-vae")


@pytest.fixture(scope="module", params=BACKENDS)
def drawing(
    request: pytest.FixtureRequest, checkpoints: Path, cache_dir: Path, tiny_vae: Path
) -> Iterator[tuple[Runner, Calls]]:
    """A runner with both decoders, and its calls so far."""
    order = Order(
        str(checkpoints / "tiny-sd"), request.param, cache_dir=cache_dir, num_threads=1,
        tiny_vae=str(tiny_vae),
    )  # fmt: skip
    calls: Calls = []
    model = load_model(order, lambda *_: None)
    engines = {name: _Noted(name, engine, calls) for name, engine in model.engines.items()}
    runner = Runner(dataclasses.replace(model, engines=engines), max_batch=8)
    yield runner, calls
    runner.close()


@pytest.fixture(scope="module")
def peers(checkpoints: Path, tiny_vae: Path) -> dict[str, Peer]:
    """By decoder."""
    folder = checkpoints / "tiny-sd"
    return {
        "full": Peer(folder), "tiny": Peer(folder, vae=AutoencoderTiny.from_pretrained(tiny_vae)),
    }  # fmt: skip


def tiny_pixels(tiny_vae: Path, latents: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, 3]`` as diffusers' pipelines make them of latents ``[C, h, w]``."""
    vae = AutoencoderTiny.from_pretrained(tiny_vae)
    with torch.inference_mode():
        decoded = vae.decode(torch.from_numpy(latents)[None] / vae.config.scaling_factor).sample
    return np.asarray(VaeImageProcessor().postprocess(decoded, output_type="pil")[0])


def test_rows_of_both_share_steps_and_agree(
    drawing: tuple[Runner, Calls], peers: dict[str, Peer]
) -> None:
    runner, calls = drawing
    calls.clear()
    together = draw_together(runner, MIXED)
    assert [rows for part, rows in calls if part == "denoiser"] == [5, 5, 5]  # one is guided
    assert {part: rows for part, rows in calls if "vae" in part} == {
        "vae_encoder": 1, "tiny_vae_encoder": 1, "vae_decoder": 2, "tiny_vae_decoder": 2,
    }  # fmt: skip
    for wanted, ours in zip(MIXED, together, strict=True):
        assert_agree(ours, peers[wanted.decoder].draw(wanted), wanted)
        (alone,) = draw_together(runner, [wanted])
        assert psnr_db(alone.pixels, ours.pixels) >= MIN_PSNR_DB
    assert psnr_db(together[0].pixels, peers["full"].draw(MIXED[3]).pixels) < 30


def test_it_encodes_what_it_decodes(drawing: tuple[Runner, Calls], peers: dict[str, Peer]) -> None:
    """As diffusers' image-to-image and inpainting do with ``vae=AutoencoderTiny``."""
    runner, calls = drawing
    calls.clear()
    together = draw_together(runner, PICTURED)
    assert {part for part, _ in calls if part.endswith("vae_encoder")} == {"tiny_vae_encoder"}
    for wanted, ours in zip(PICTURED, together, strict=True):
        assert_agree(ours, peers["tiny"].draw(wanted), wanted)
        full = peers["full"].draw(wanted).latents
        assert np.abs(ours.latents - full).max() > 0.1, "the other encoder gives something else"


def test_previews_are_by_the_tiny_one(drawing: tuple[Runner, Calls], tiny_vae: Path) -> None:
    runner, calls = drawing
    row = runner.start(recipe(num_steps=4, num_previews=1))
    runner.encode_text([row])
    while row.stage is Stage.DENOISE:
        runner.denoise([row])
    assert row.stage is Stage.PREVIEW
    assert row.denoised is not None
    expected = tiny_pixels(tiny_vae, row.denoised.numpy())
    calls.clear()
    runner.decode([row])
    assert calls == [("tiny_vae_decoder", 1)]
    assert psnr_db(row.previews[0], expected) >= MIN_PSNR_DB
    assert row.decoding.decoder == "full"


def test_warming_up_runs_both(drawing: tuple[Runner, Calls]) -> None:
    runner, calls = drawing
    calls.clear()
    runner.warm_up()
    for part in ("vae_encoder", "tiny_vae_encoder", "vae_decoder", "tiny_vae_decoder"):
        assert [rows for name, rows in calls if name == part] == [2, 1]


def test_a_model_without_one_refuses_it(runners: dict[tuple[str, str], Runner]) -> None:
    runner = runners["tiny-sd", "torch"]
    assert runner.info.decoders == ("full",)
    with pytest.raises(InvalidInput, match=r"is loaded with full; --tiny-vae gives it a tiny one"):
        runner.start(recipe(decoder="tiny"))


@pytest.mark.parametrize("layout", ["folder", "file", "pipeline"])
def test_it_is_found_as_people_have_it(
    layout: str, tiny_vae: Path, checkpoints: Path, tmp_path: Path
) -> None:
    given = tiny_vae
    if layout == "file":
        AutoencoderTiny().save_pretrained(tmp_path)  # a file says no widths: TAESD's own
        given = tmp_path / WEIGHTS
    if layout == "pipeline":
        given = Path(shutil.copytree(tiny_vae, tmp_path / "some" / "vae")).parent
    pipeline = load_pipeline(checkpoints / "tiny-sd", "fp32", Overrides({"tiny_vae": given}))
    assert type(pipeline.vae).__name__ == "AutoencoderKL"
    expected = load_file(given if given.is_file() else tiny_vae / WEIGHTS)
    for name, value in pipeline.tiny_vae.state_dict().items():
        assert torch.equal(value, expected[name])


def test_what_is_no_tiny_vae_of_this_model_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    base = checkpoints / "tiny-sd"
    make_tiny_vae(tmp_path / "flux", latent_channels=16)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    for given, said in {
        base / "vae": "is of class 'AutoencoderKL'; known are AutoencoderTiny",
        base / "vae" / WEIGHTS: r"has no AutoencoderTiny \(TAESD's architecture\) in it",
        base / "unet" / WEIGHTS: "is a UNet alone, not a tiny VAE: give it by --unet FILE",
        tmp_path / "flux": "latents of 16 channels to 8 pixels a side, this model's have 4 and",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            load_pipeline(base, "fp32", Overrides({"tiny_vae": given}))


def test_a_bundle_keeps_it_and_the_default(
    checkpoints: Path, cache_dir: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    overrides = Overrides({"tiny_vae": tiny_vae})
    base, defaults = checkpoints / "tiny-sd", Defaults(decoder="tiny")
    assert Blueprint(base).key != Blueprint(base, overrides=overrides).key
    with pytest.raises(InvalidInput, match="decoder is 'tiny'; tiny-sd is loaded with full"):
        build_bundle(Blueprint(base, defaults=defaults), tmp_path / "none", lambda *_: None)
    blueprint = Blueprint(base, defaults=defaults, overrides=overrides)
    bundle = build_bundle(blueprint, tmp_path / "bundle", lambda *_: None, cache_dir)
    runner = Runner.open(Order(str(bundle.folder), num_threads=1))
    assert runner.info.decoders == ("full", "tiny")
    assert runner.default_recipe(0).decoder == "tiny"
    runner.close()
    assert f"{'tiny_vae':<24}tiny-vae (" in CliRunner().invoke(
        app, ["inspect", str(bundle.folder)]
    ).output  # fmt: skip


def test_in_a_bundle_of_before_it_decodes_alone(
    checkpoints: Path,
    cache_dir: Path,
    tiny_vae: Path,
    tmp_path: Path,
    peers: dict[str, Peer],
) -> None:
    blueprint = Blueprint(checkpoints / "tiny-sd", overrides=Overrides({"tiny_vae": tiny_vae}))
    bundle = build_bundle(blueprint, tmp_path / "bundle", lambda *_: None, cache_dir)
    manifest = json.loads((bundle.folder / MANIFEST).read_text())
    del manifest["facts"]["tiny_encodes"], manifest["files"]["tiny_vae_encoder.onnx"]
    (bundle.folder / MANIFEST).write_text(json.dumps(manifest))
    bundle.part("tiny_vae_encoder").unlink()
    runner = Runner.open(Order(str(bundle.folder), num_threads=1))
    assert (runner.info.encoders, runner.info.decoders) == (("full",), ("full", "tiny"))
    (ours,) = draw_together(runner, PICTURED[:1])
    theirs = peers["full"].draw(PICTURED[0])
    assert_agree(ours, dataclasses.replace(theirs, pixels=tiny_pixels(tiny_vae, theirs.latents)))
    runner.close()


def test_the_demo_models_bring_theirs() -> None:
    assert find(Order("demo-lcm")).overrides.components.keys() == {"tiny_vae"}
    assert find(Order("demo-lcm", vae="demo-tiny-vae")).overrides.components.keys() == {"vae"}


def test_verify_compares_it(tiny_vae: Path, checkpoints: Path, cache_dir: Path) -> None:
    options = ["--tiny-vae", str(tiny_vae), "--cache-dir", str(cache_dir), "--engine", "torch"]
    result = CliRunner().invoke(app, ["verify", str(checkpoints / "tiny-sd"), *options])
    assert result.exit_code == 0, result.output
    assert "tiny_vae_decoder.pixels" in result.output
