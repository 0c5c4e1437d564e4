"""The whole recipe in miniature: every stage, published, opened by diffusers, examined, drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from engines.cli import app
from engines.distill import cli
from engines.distill.clips import ClipModel
from engines.distill.publish import publish
from engines.distill.stages import STAGES, run_stage
from engines.distill.training import Place, TrainingError
from engines.drawing.runner import Runner
from engines.order import Order
from tests.engines.peers import psnr_db

TINY = {"num_steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two steps' training each: they draw noise, but they are whole."""
    work = tmp_path_factory.mktemp("work")
    place = Place(work, torch.device("cpu"), data_share=0.0)
    for name in STAGES:
        assert run_stage(name, place, TINY)
        assert not run_stage(name, place, TINY), "a finished stage is kept"
    out = tmp_path_factory.mktemp("models")
    names = ["demo-base", "demo-lcm", "demo-lcm-lora", "demo-striped-lora", "demo-checkered-lora"]
    assert publish(work, out) == [*names, "demo-tiny-vae", "demo-motion", "critic"]
    return out


def test_the_command_has_every_stage() -> None:
    assert list(cli.STAGES) == list(STAGES)


def test_a_finished_stage_refuses_other_settings(models: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, torch.device("cpu"), data_share=0.0)
    run_stage("critic", place, TINY)
    with pytest.raises(TrainingError, match=r"other settings \(num_steps\)"):
        run_stage("critic", place, TINY | {"num_steps": 3})


def test_a_stage_says_which_one_it_needs(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="run `fourstep distill text` first"):
        run_stage("base", Place(tmp_path, torch.device("cpu")), TINY)


@pytest.mark.parametrize("name", ["demo-base", "demo-lcm"])
def test_diffusers_opens_what_is_published(models: Path, name: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(models / name, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a heart", num_inference_steps=1, guidance_scale=1.0).images[0]
    assert image.size == (128, 128)
    for file in (models / name).rglob("*.json"):
        assert str(models.parent) not in file.read_text()


def test_loras_load_and_combine(models: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(models / "demo-base", torch_dtype=torch.float32)
    for name in ("demo-lcm-lora", "demo-striped-lora"):
        pipeline.load_lora_weights(models / name, adapter_name=name)
    pipeline.set_adapters(["demo-lcm-lora", "demo-striped-lora"], [1.0, 0.8])
    assert pipeline.get_active_adapters() == ["demo-lcm-lora", "demo-striped-lora"]


def test_the_table_and_the_sheet_come_from_published_weights(models: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    options = ["--models", str(models), "--threads", "1"]
    few = ["--num-prompts", "32", "--max-steps", "1"]
    result = run(app, ["distill", "evaluate", *options, *few], catch_exceptions=False)
    assert result.exit_code == 0
    assert "| demo-lcm | 1 | 3 |" in result.stdout
    assert "| demo-lcm + demo-tiny-vae | 1 | 3 |" in result.stdout
    result = run(
        app, ["distill", "sheet", "-o", str(tmp_path / "sheet.png"), *options],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_the_clips_of_what_is_published(models: Path) -> None:
    """They are drawn by the engine as the exam draws them, pictures too; each is examined."""
    runner = Runner.open(Order(str(models / "demo-motion"), "torch", num_threads=1))
    info = runner.info
    assert (info.default_num_frames, info.max_num_frames, info.default_num_steps) == (8, 8, 4)
    assert info.guidance_embedding
    prompt = "a large red star at the left on a pink background"
    plain = runner.default_recipe(7, prompt, 2)
    clip = dataclasses.replace(plain, guidance_scale=3.0)
    picture = dataclasses.replace(clip, num_frames=1)
    drawn = [drawing.pixels for drawing in runner.draw([clip, picture])]
    runner.close()
    assert [each.shape for each in drawn if each is not None] == [
        (8, 128, 128, 3),
        (1, 128, 128, 3),
    ]
    expected = ClipModel(models).draw([prompt], 2, 3.0, 7)[0]
    assert drawn[0] is not None
    assert psnr_db(drawn[0], expected) >= 50
    options = ["--models", str(models), "--num-prompts", "7", "--max-steps", "1", "--threads", "1"]
    result = CliRunner().invoke(app, ["distill", "evaluate-motion", *options])
    assert result.exit_code == 0, result.exception
    assert "| demo-motion | 1 |" in result.stdout
    assert "| painted |  | 100.0 | 100.0 | 100.0 |" in result.stdout


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["distill", "vae", "--learning-rate", "2"])
    assert result.exit_code == 2
    assert "--learning-rate is 2" in result.output
    result = CliRunner().invoke(app, ["distill", "vae", "--device", "abacus"])
    assert isinstance(result.exception, TrainingError)
