"""Options over a checkpoint's scheduler: Lightning over a plain base, as diffusers draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from typer.testing import CliRunner

from engines.build.bundle import Blueprint
from engines.build.checkpoint import load_facts, load_pipeline
from engines.build.source import Overrides, find_overrides
from engines.cli import app
from engines.drawing.runner import Runner
from engines.errors import BundleError, CheckpointError
from engines.order import Order
from service.settings import load_settings
from tests.engines.checkpoints import make_xl_checkpoint, with_scheduler
from tests.engines.peers import Peer, assert_agree, draw_together, recipe

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PLAIN = {  # SDXL base's own
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
TRAILING = {"timestep_spacing": "trailing"}
ONE_STEP = TRAILING | {"prediction_type": "sample"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return with_scheduler(PLAIN, make_xl_checkpoint(folder / "tiny-xl"), folder / "plain-xl")


@pytest.fixture(scope="module")
def unet(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled UNet as its authors publish it: one file of other weights."""
    torch.manual_seed(7)
    distilled = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet"))
    folder = tmp_path_factory.mktemp("distilled")
    distilled.save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


def peer_of(base: Path, unet: Path, folder: Path, options: dict[str, Any]) -> Peer:
    """diffusers' pipeline of base and UNet, its scheduler remade with ``options``."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        base, unet=UNet2DConditionModel.from_pretrained(unet.parent)
    )
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **options)
    pipeline.save_pretrained(folder)
    return Peer(folder)


@pytest.mark.parametrize(("num_steps", "options"), [(1, ONE_STEP), (4, TRAILING)])
def test_lightning_over_a_plain_base(
    num_steps: int, options: dict[str, Any], base: Path, unet: Path, tmp_path: Path
) -> None:
    order = Order(str(base), "torch", num_threads=1, unet=str(unet), scheduler=options)
    runner, peer = Runner.open(order), peer_of(base, unet, tmp_path / "lightning", options)
    assert (runner.info.default_sampler, runner.info.default_num_steps) == ("euler", 4)
    wanted = recipe(num_steps=num_steps, sampler="euler", guidance_scale=0.0)
    (ours,) = draw_together(runner, [wanted])
    assert_agree(ours, peer.draw(wanted), wanted)
    runner.close()


def test_an_option_outdoes_what_the_pipeline_sets(checkpoints: Path) -> None:
    """Stable Diffusion's pipelines set steps_offset to 1 in any scheduler they are given."""
    source = checkpoints / "tiny-sd"
    overrides = find_overrides(None, None, None, {"steps_offset": 0})
    pipeline = load_pipeline(source, "fp32", overrides)
    assert load_facts(source, pipeline).scheduler["steps_offset"] == 1
    assert load_facts(source, pipeline, overrides).scheduler["steps_offset"] == 0


def test_bundles_keep_them(base: Path, unet: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    given = [f"--scheduler={name}={value}" for name, value in ONE_STEP.items()]
    done = CliRunner().invoke(
        app, ["build", str(base), "--out", str(out), "--unet", str(unet), *given]
    )
    assert done.exit_code == 0, done.output
    runner = Runner.open(Order(str(out), "onnxruntime", num_threads=1))
    wanted = recipe(num_steps=1, sampler="euler", guidance_scale=0.0)
    (ours,) = draw_together(runner, [wanted])
    assert_agree(ours, peer_of(base, unet, tmp_path / "peer", ONE_STEP).draw(wanted), wanted)
    runner.close()
    with pytest.raises(BundleError, match="--scheduler and --architecture to fourstep build"):
        Runner.open(Order(str(out), scheduler=TRAILING))


def test_other_options_are_another_bundle(base: Path) -> None:
    given: list[dict[str, Any]] = [
        {}, TRAILING, {"timestep_spacing": "linspace"}, {"steps_offset": 1}, {"steps_offset": 0},
    ]  # fmt: skip
    keys = {Blueprint(base, overrides=Overrides(scheduler=each)).key for each in given}
    assert len(keys) == len(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": "trailing"}, "spacing is not known; known are algorithm_type, beta_end, .*"),
        (
            {"timestep_spacing": "trail"},
            "timestep_spacing is 'trail'; it must be one of leading, trailing, linspace",
        ),
        (
            {"prediction_type": "x0"},
            "prediction_type is 'x0'; it must be one of epsilon, v_prediction, sample",
        ),
        ({"use_karras_sigmas": 1}, "use_karras_sigmas is 1; it must be true or false"),
        ({"steps_offset": True}, "steps_offset is True; it must be a whole number from 0 to 100"),
        ({"steps_offset": 0.5}, "steps_offset is 0.5; it must be a whole number from 0 to 100"),
        ({"beta_end": 12}, "beta_end is 12; it must be a number from 1e-09 to 0.999"),
        ({"beta_end": float("nan")}, "beta_end is nan; it must be a number from 1e-09 to 0.999"),
        ({"trained_betas": [0.1]}, "trained_betas is not known; known are .*"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, base: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^scheduler option {message}$"):
        Runner.open(Order(str(base), "torch", scheduler=options))


@pytest.mark.parametrize("text", ["timestep_spacing", "=trailing", "timestep_spacing="])
def test_what_is_no_option_is_refused_by_the_command(text: str, base: Path, tmp_path: Path) -> None:
    asked = ["build", str(base), "--out", str(tmp_path / "x"), "--scheduler", text]
    done = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert f"--scheduler is '{text}'; write it as KEY=VALUE, each key once" in done.output


def test_a_config_says_them_with_their_types() -> None:
    given: dict[str, Any] = {
        "timestep_spacing": "trailing", "steps_offset": 0, "beta_end": 0.5,
        "use_karras_sigmas": True,
    }  # fmt: skip
    found = load_settings({"scheduler": given}).order.scheduler
    assert {name: repr(value) for name, value in found.items()} == {
        name: repr(value) for name, value in given.items()
    }
