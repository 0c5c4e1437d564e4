"""Checkpoint folders as they are in the wild: what loads, and the one line for what does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from engines.build.checkpoint import load_facts, load_pipeline
from engines.build.source import resolve
from engines.errors import CheckpointError

COMPONENTS = ("unet", "vae", "text_encoder")


@pytest.fixture
def folder(checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints / "tiny-sd", tmp_path / "model"))


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_facts(folder, load_pipeline(folder, "fp32"))
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("component", "entry", "known"),
    [
        ("unet", ["diffusers", "UNet2DModel"], "UNet2DConditionModel"),
        ("vae", ["diffusers", "AsymmetricAutoencoderKL"], "AutoencoderKL, AutoencoderTiny"),
        ("text_encoder", ["transformers", "CLIPTextModelWithProjection"], "CLIPTextModel"),
        ("tokenizer", ["transformers", "T5Tokenizer"], "CLIPTokenizer, CLIPTokenizerFast"),
        ("text_encoder", [None, None], "CLIPTextModel"),
        ("vae", "AutoencoderKL", "AutoencoderKL, AutoencoderTiny"),
    ],
)
def test_a_component_of_another_class_is_named(
    component: str, entry: Any, known: str, folder: Path
) -> None:
    _edit(folder / "model_index.json", **{component: entry})
    found = entry[1] if isinstance(entry, list) else None
    assert f"has {found!r} as its {component}; known are {known}" in _refusal(folder)


def test_weights_of_another_class_than_the_index_says(folder: Path) -> None:
    _edit(folder / "vae" / "config.json", _class_name="AutoencoderTiny")
    assert "calls the vae AutoencoderKL" in (line := _refusal(folder))
    assert "calls it AutoencoderTiny" in line


@pytest.mark.parametrize("size", [None, [8, 16], [], 0, True, [[8]], "8"])
def test_a_sample_size_that_is_no_side(size: Any, folder: Path) -> None:
    _edit(folder / "unet" / "config.json", sample_size=size)
    assert "sample_size" in _refusal(folder)


def test_a_square_sample_size_is_its_side(folder: Path) -> None:
    _edit(folder / "unet" / "config.json", sample_size=[8, 8])
    assert load_facts(folder, load_pipeline(folder, "fp32")).default_size_px == 64


@pytest.mark.parametrize("name", [["StableDiffusionPipeline"], None, 5])
def test_a_class_name_that_is_none(name: Any, folder: Path) -> None:
    _edit(folder / "model_index.json", _class_name=name)
    assert f"the _class_name {name!r}; it must be" in _refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_an_index_that_is_no_object(text: str, folder: Path) -> None:
    (folder / "model_index.json").write_bytes(text.encode("latin-1"))
    assert str(folder / "model_index.json") in _refusal(folder)


def _halve(folder: Path, components: Iterable[str], variant: str) -> None:
    """Leave their weights in halves, under the variant's name alone."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    for component in components:
        (plain,) = (folder / component).glob("*.safetensors")
        pipeline.components[component].save_pretrained(folder / component, variant=variant)
        plain.unlink()


@pytest.mark.parametrize("components", [COMPONENTS, ("unet",), ("vae", "text_encoder")], ids=str)
@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_a_variant_is_taken_where_there_is_no_other(
    variant: str, components: tuple[str, ...], folder: Path, checkpoints: Path
) -> None:
    _halve(folder, components, variant)
    ours = load_pipeline(folder, "fp32")
    theirs = DiffusionPipeline.from_pretrained(folder, variant=variant)
    exact = DiffusionPipeline.from_pretrained(checkpoints / "tiny-sd")
    for component in COMPONENTS:
        weights, plain = (
            pipeline.components[component].state_dict() for pipeline in (theirs, exact)
        )
        for name, weight in ours.components[component].state_dict().items():
            assert torch.equal(weight, weights[name])
            halved = component in components
            assert torch.equal(weight, plain[name].half().float() if halved else plain[name])


def test_plain_weights_come_before_a_variant(folder: Path, checkpoints: Path) -> None:
    _halve(folder, COMPONENTS, "fp16")
    for component in COMPONENTS:
        (plain,) = (checkpoints / "tiny-sd" / component).glob("*.safetensors")
        shutil.copy(plain, folder / component)
    ours = load_pipeline(folder, "fp32").unet.state_dict()
    theirs = DiffusionPipeline.from_pretrained(checkpoints / "tiny-sd").unet.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_two_variants_at_once_are_refused(folder: Path) -> None:
    unet, vae = (next((folder / name).glob("*.safetensors")) for name in ("unet", "vae"))
    unet.rename(unet.with_suffix(".fp16.safetensors"))
    vae.rename(vae.with_suffix(".ema.safetensors"))
    assert "in different variants (ema, fp16)" in _refusal(folder)


def test_what_serving_does_not_need_may_be_absent(folder: Path) -> None:
    _edit(
        folder / "model_index.json",
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        requires_safety_checker=True,
    )
    pipeline = load_pipeline(folder, "fp32")
    assert pipeline.feature_extractor is pipeline.image_encoder is pipeline.safety_checker is None


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./model.safetensors", "neither a folder, a safetensors file"),
        ("models/x.safetensors", "neither a folder, a safetensors file"),
        ("x.ckpt", "only safetensors are read"),
        ("owner/x.ckpt", "only safetensors are read"),
    ],
)
def test_a_single_file_is_told_from_a_hub_id(model: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        resolve(model)
    assert resolve("owner/model") is None
