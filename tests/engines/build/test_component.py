"""A UNet or VAE in place of the model's own: as diffusers loads it, and in the bundle's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from engines.build.bundle import Blueprint, build_bundle
from engines.build.checkpoint import load_facts, load_pipeline
from engines.build.source import Overrides, find_overrides
from engines.cli import app
from engines.drawing.runner import Runner
from engines.errors import BundleError, CheckpointError
from engines.order import Order
from tests.engines.ldm import checkpoint_state, unet_state, vae_state
from tests.engines.peers import Peer, assert_agree, draw_together, recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def other(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of tiny-sd's architecture with other weights in its UNet and VAE."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoints / "tiny-sd")
    torch.manual_seed(7)
    for name in ("unet", "vae"):
        for parameter in getattr(pipeline, name).parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("other") / "other"
    pipeline.save_pretrained(folder)
    return folder


def _as(layout: str, name: str, other: Path, folder: Path) -> Path:
    """The other pipeline's component, as people have one."""
    pipeline = DiffusionPipeline.from_pretrained(other)
    component = getattr(pipeline, name)
    file = folder / f"{name}.safetensors"
    if layout == "pipeline":
        return other
    if layout == "folder":
        return other / name
    if layout == "file":
        return other / name / WEIGHTS
    if layout == "halves":
        component.half().save_pretrained(folder / "halves", variant="fp16")
        return folder / "halves"
    if layout == "shards":
        component.save_pretrained(folder / "shards", max_shard_size="200KB")
        return folder / "shards"
    state = {
        "ldm": lambda: unet_state(component) if name == "unet" else vae_state(component),
        "ldm alone": lambda: vae_state(component, ""),
        "checkpoint": lambda: checkpoint_state(pipeline),
    }[layout]()
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    return file


LAYOUTS = ("pipeline", "folder", "file", "halves", "shards", "ldm", "checkpoint")


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, layout) for name in ("unet", "vae") for layout in LAYOUTS), ("vae", "ldm alone")],
)
def test_weights_are_the_given_ones(
    name: str, layout: str, other: Path, checkpoints: Path, tmp_path: Path
) -> None:
    base = checkpoints / "tiny-sd"
    overrides = Overrides({name: _as(layout, name, other, tmp_path)})
    ours, theirs = load_pipeline(base, "fp32", overrides), DiffusionPipeline.from_pretrained(other)
    expected = getattr(theirs, name).half().float() if layout == "halves" else getattr(theirs, name)
    found = getattr(ours, name).state_dict()
    for key, weight in expected.state_dict().items():
        assert torch.equal(found[key], weight)
    kept = "vae" if name == "unet" else "unet"
    own = getattr(DiffusionPipeline.from_pretrained(base), kept).state_dict()
    assert all(torch.equal(getattr(ours, kept).state_dict()[key], own[key]) for key in own)
    if layout == "shards":
        assert len(list(overrides.components[name].glob("*.safetensors"))) > 1


def test_a_base_in_shards(checkpoints: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(checkpoints / "tiny-sd")
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    pipeline.save_pretrained(tmp_path / "both", max_shard_size="100KB", variant="fp16")
    for folder in (tmp_path / "shards", tmp_path / "both"):
        assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
        ours = load_pipeline(folder, "fp32")
        for name in ("unet", "vae", "text_encoder"):
            expected = pipeline.components[name].state_dict()
            found = ours.components[name].state_dict()
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_unet_file_with_a_guidance_embedding(checkpoints: Path) -> None:
    file = checkpoints / "tiny-lcm" / "unet" / WEIGHTS
    overrides, base = Overrides({"unet": file}), checkpoints / "tiny-sd"
    pipeline = load_pipeline(base, "fp32", overrides)
    expected = UNet2DConditionModel.from_pretrained(file.parent)
    assert pipeline.unet.config.time_cond_proj_dim == expected.config.time_cond_proj_dim == 32
    found = pipeline.unet.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())
    assert load_facts(base, pipeline, overrides).time_cond_dim == 32


def test_a_tiny_vae_as_a_file(checkpoints: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderTiny()
    vae.save_pretrained(tmp_path)
    overrides = Overrides({"vae": tmp_path / WEIGHTS})
    found = load_pipeline(checkpoints / "tiny-sd", "fp32", overrides).vae
    assert type(found).__name__ == "AutoencoderTiny"
    assert found.config.scaling_factor == vae.config.scaling_factor
    expected = vae.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_pictures_are_those_of_a_folder_with_these_weights(
    backend: str, other: Path, checkpoints: Path, cache_dir: Path, tmp_path: Path
) -> None:
    base, unet = checkpoints / "tiny-sd", other / "unet" / WEIGHTS
    order = Order(str(base), backend, cache_dir=cache_dir, unet=str(unet), num_threads=1)
    runner = Runner.open(order)
    wanted = recipe(num_steps=3, guidance_scale=3.0)
    (ours,) = draw_together(runner, [wanted])
    assert runner.info.components == {"unet": "unet"}
    runner.close()
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    shutil.copy(unet, whole / "unet" / WEIGHTS)
    assert_agree(ours, Peer(whole).draw(wanted), wanted)


def test_a_bundle_says_what_is_in_it(
    other: Path, checkpoints: Path, cache_dir: Path, tmp_path: Path
) -> None:
    base = checkpoints / "tiny-sd"
    overrides = Overrides({"unet": other / "unet", "vae": other / "vae"})
    blueprints = [
        Blueprint(base, overrides=each)
        for each in (
            overrides, Overrides({"unet": other / "unet"}), Overrides({"vae": other / "vae"}),
            Overrides({"unet": base / "unet"}), Overrides(),
        )
    ]  # fmt: skip
    assert len({blueprint.key for blueprint in blueprints}) == len(blueprints)
    bundle = build_bundle(blueprints[0], tmp_path / "bundle", lambda *_: None, cache_dir)
    assert bundle.facts.components == {"unet": "unet", "vae": "vae"}
    done = CliRunner().invoke(app, ["inspect", str(bundle.folder)])
    for name, (_, digest) in blueprints[0].beside.items():
        assert f"{name:<24}{name} ({digest[:16]})" in done.output
    with pytest.raises(BundleError, match="is a bundle, whose parts are built in"):
        Runner.open(Order(str(bundle.folder), unet=str(other / "unet")))


def _refusal(base: Path, **given: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(base, "fp32", find_overrides(given.get("unet"), given.get("vae"), None))
    (line,) = str(caught.value).splitlines()
    return line


def test_what_is_no_such_component_is_named(other: Path, checkpoints: Path, tmp_path: Path) -> None:
    base = checkpoints / "tiny-sd"
    unet, vae = (str(other / name / WEIGHTS) for name in ("unet", "vae"))
    assert "is a VAE alone, not a UNet: give it by --vae FILE" in _refusal(base, unet=vae)
    assert "is a UNet alone, not a VAE: give it by --unet FILE" in _refusal(base, vae=unet)
    assert "class 'AutoencoderKL'; known are UNet2D" in _refusal(base, unet=str(other / "vae"))
    assert "has neither config.json nor unet/config.json" in _refusal(base, unet=str(tmp_path))
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, lora)
    assert "is a LoRA, not a UNet: give it by --lora" in _refusal(base, unet=str(lora))
    assert "'absent' is neither a file nor a folder" in _refusal(base, unet="absent")
    pickle = tmp_path / "unet.bin"
    pickle.write_bytes(b"\x80\x04.")
    assert "only safetensors are read" in _refusal(base, unet=str(pickle))


def test_another_architecture_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    demo = checkpoints / "tiny-demo" / "unet"
    line = _refusal(checkpoints / "tiny-sd", unet=str(demo / WEIGHTS))
    assert "must be of the base's own architecture" in line
    state = load_file(checkpoints / "tiny-sd" / "unet" / WEIGHTS)
    wide = state | {"conv_in.weight": torch.zeros(64, 4, 3, 3)}
    save_file(wide, tmp_path / "wide.safetensors")
    line = _refusal(checkpoints / "tiny-sd", unet=str(tmp_path / "wide.safetensors"))
    assert "must be of the base's own architecture" in line


def test_editing_is_refused_by_its_inputs(checkpoints: Path, tmp_path: Path) -> None:
    base = checkpoints / "tiny-sd"
    options: dict[str, Any] = json.loads((base / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config(options | {"in_channels": 8}).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / WEIGHTS):
        line = _refusal(base, unet=str(path))
        assert "8 input channels, two images (editing)" in line
