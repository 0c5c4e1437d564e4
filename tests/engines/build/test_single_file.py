"""Single files in the original layout: loaded to the byte, told apart, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

from engines.build.checkpoint import described_in, load_facts, load_pipeline
from engines.build.single_file import (
    Header,
    _tokenizers,
    architecture_of,
    load_checkpoint,
    read_header,
)
from engines.build.source import ARCHITECTURES, Overrides, find_model
from engines.drawing.runner import Runner
from engines.errors import CheckpointError
from engines.order import Order
from tests.engines.ldm import UNET, State, checkpoint_state

# Of the published checkpoints: safetensors' own count on their pages.
NUM_PARAMETERS = {
    "stable-diffusion-v1-5": (859_520_964, 83_653_863, 123_060_480),
    "stable-diffusion-2-1": (865_910_724, 83_653_863, 340_387_840),
    "stable-diffusion-2-1-base": (865_910_724, 83_653_863, 340_387_840),
    "stable-diffusion-xl-base-1.0": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
}


def _state(folder: Path) -> State:
    return checkpoint_state(DiffusionPipeline.from_pretrained(folder))


def _write(file: Path, state: State, **metadata: str) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, file, metadata)
    return file


def _tell(model: Path, checkpoints: Path, *, architecture: bool = True) -> str:
    """The one line of a refusal."""
    overrides = Overrides(architecture=checkpoints / "tiny-sd" if architecture else None)
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(find_model(str(model)), "fp32", overrides)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.fixture
def file(checkpoints: Path, tmp_path: Path) -> Path:
    return _write(tmp_path / "mine.safetensors", _state(checkpoints / "tiny-sd"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_are_those_of_the_folder(precision: str, file: Path, checkpoints: Path) -> None:
    folder = checkpoints / "tiny-sd"
    overrides = Overrides(architecture=folder)
    ours, theirs = load_pipeline(file, precision, overrides), load_pipeline(folder, precision)
    for name in ("unet", "vae", "text_encoder"):
        expected = theirs.components[name].state_dict()
        found = ours.components[name].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert load_facts(file, ours, overrides).name == "mine"


def test_open_clip_of_stable_diffusion_2(checkpoints: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(checkpoints / "tiny-v")
    pipeline.text_encoder.config.hidden_act = "gelu"
    pipeline.save_pretrained(tmp_path / "folder")
    file = _write(tmp_path / "it.safetensors", checkpoint_state(pipeline))
    assert not any("cond_stage_model.transformer" in key for key in read_header(file).shapes)
    ours = load_pipeline(file, "fp32", Overrides(architecture=tmp_path / "folder"))
    expected = pipeline.text_encoder.state_dict()
    for key, weight in ours.text_encoder.state_dict().items():
        assert torch.equal(weight, expected[key])


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_pictures_are_those_of_the_folder(
    backend: str, file: Path, checkpoints: Path, cache_dir: Path
) -> None:
    folder = str(checkpoints / "tiny-sd")
    order = Order(str(file), backend, cache_dir=cache_dir, architecture=folder, num_threads=1)
    pictures = []
    for each in (order, Order(folder, backend, cache_dir=cache_dir, num_threads=1)):
        runner = Runner.open(each)
        (drawing,) = runner.draw([runner.default_recipe(3, "a red circle", 3)])
        pictures.append(drawing.pixels)
        runner.close()
    assert pictures[0] is not None
    assert (pictures[0] == pictures[1]).all()


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_a_shipped_architecture_is_the_published_one(name: str, tmp_path: Path) -> None:
    """Sizes and keys on the meta device: nothing is allocated."""
    folder = ARCHITECTURES / name
    index = json.loads((folder / "model_index.json").read_text())
    components: dict[str, Any] = {}
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if part not in index:
            continue
        library, kind = index[part]
        options = json.loads((folder / part / "config.json").read_text())
        with init_empty_weights():
            if library == "diffusers":
                components[part] = getattr(diffusers, kind).from_config(options)
            else:
                config = transformers.CLIPTextConfig(**options)
                components[part] = getattr(transformers, kind)(config)
    counts = tuple(
        sum(parameter.numel() for parameter in component.parameters())
        for component in components.values()
    )
    assert counts == NUM_PARAMETERS[name]
    pipeline = type("Pipeline", (), components)
    shapes = {key: tuple(value.shape) for key, value in checkpoint_state(pipeline).items()}
    found = architecture_of(Header(tmp_path, shapes, {}))
    assert found.name == name.removesuffix("-base")  # a 2.1 of 512 px has the same shapes
    scheduler = getattr(diffusers, index["scheduler"][1]).load_config(folder, subfolder="scheduler")
    assert scheduler["_class_name"] == index["scheduler"][1]


def test_the_shipped_vocabulary_is_clips() -> None:
    # The README of openai/CLIP's tokenizer and the documentation of transformers have these ids.
    for name, pad in {"stable-diffusion-v1-5": 49407, "stable-diffusion-2-1": 0}.items():
        tokenizer = _tokenizers(ARCHITECTURES / name)["tokenizer"]
        ids = tokenizer("a photo of a cat").input_ids
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]
        assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
        assert tokenizer.pad_token_id == pad
    assert _tokenizers(ARCHITECTURES / "stable-diffusion-xl-base-1.0").keys() == {
        "tokenizer", "tokenizer_2"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metadata", "empty", "expected"),
    [
        ({}, (), ("epsilon", False)),
        ({"modelspec.prediction_type": "v"}, (), ("v_prediction", False)),
        ({"modelspec.prediction_type": "epsilon"}, (), ("epsilon", False)),
        ({}, ("v_pred", "ztsnr"), ("v_prediction", True)),
    ],
)
def test_what_the_file_says_of_its_noise(
    metadata: dict[str, str], empty: tuple[str, ...], expected: tuple[str, bool],
    checkpoints: Path, tmp_path: Path,
) -> None:  # fmt: skip
    state = _state(checkpoints / "tiny-sd") | {key: torch.zeros(0) for key in empty}
    file = _write(tmp_path / "it.safetensors", state, **metadata)
    overrides = Overrides(architecture=checkpoints / "tiny-sd")
    scheduler = load_facts(file, load_pipeline(file, "fp32", overrides), overrides).scheduler
    said = scheduler.get("prediction_type"), scheduler.get("rescale_betas_zero_snr", False)
    assert said == expected


def test_xl_loads_as_diffusers_pipeline(tmp_path: Path, checkpoints: Path) -> None:
    """Two text encoders and a size embedding, by the same loader; families are none of its."""
    pipeline = _tiny_xl(checkpoints)
    pipeline.save_pretrained(tmp_path / "folder")
    file = _write(tmp_path / "it.safetensors", checkpoint_state(pipeline))
    ours = load_checkpoint(
        file, "StableDiffusionXLPipeline", tmp_path / "folder", {}, torch.float32
    )
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected = pipeline.components[name].state_dict()
        found = ours.components[name].state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def _tiny_xl(checkpoints: Path) -> Any:
    base = DiffusionPipeline.from_pretrained(checkpoints / "tiny-sd")
    options = base.text_encoder.config.to_dict()
    torch.manual_seed(0)
    second = transformers.CLIPTextConfig(**options | {"hidden_size": 64, "projection_dim": 64})
    unet = diffusers.UNet2DConditionModel.from_config(
        dict(base.unet.config)
        | {
            "cross_attention_dim": 96, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64 + 6 * 8,
        }
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=unet,
        text_encoder_2=transformers.CLIPTextModelWithProjection(second), tokenizer_2=base.tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


def test_a_file_of_no_known_shape_wants_an_architecture(file: Path, checkpoints: Path) -> None:
    line = _tell(file, checkpoints, architecture=False)
    assert "cannot be loaded by diffusers as stable-diffusion-v1-5" in line
    assert "--architecture" in line
    assert described_in(file) == ARCHITECTURES / "stable-diffusion-v1-5"


def test_an_architecture_is_for_files_alone(checkpoints: Path) -> None:
    line = _tell(checkpoints / "tiny-sd", checkpoints)
    assert "--architecture is for a single file" in line


def test_missing_weights_are_named(checkpoints: Path, tmp_path: Path) -> None:
    state = _state(checkpoints / "tiny-sd")
    texts = {key: value for key, value in state.items() if not key.startswith("cond_stage_model")}
    assert "CLIPTextModel" in _tell(_write(tmp_path / "no.safetensors", texts), checkpoints)
    lost = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    one = {key: value for key, value in state.items() if key != lost}
    line = _tell(_write(tmp_path / "one.safetensors", one), checkpoints)
    assert "has no weights of text_encoder.final_layer_norm.weight" in line


def test_other_files_are_told_by_what_they_hold(checkpoints: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoints / "tiny-sd")
    state, one = _state(checkpoints / "tiny-sd"), torch.zeros(1, 1)
    files: dict[str, State] = {
        "a LoRA, not a whole checkpoint: give it by --lora": {"lora_unet_x.lora_down.weight": one},
        "a UNet alone, not a whole checkpoint: give it by --unet": pipeline.unet.state_dict(),
        "a VAE alone, not a whole checkpoint: give it by --vae": pipeline.vae.state_dict(),
        "holds model.layers.0.weight and so on": {"model.layers.0.weight": one},
        "8 input channels, two images": state
        | {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 8, 3, 3)},
    }
    for index, (expected, tensors) in enumerate(files.items()):
        file = _write(tmp_path / f"{index}.safetensors", tensors)
        assert expected in _tell(file, checkpoints, architecture=False)


@pytest.mark.parametrize("name", ["it.ckpt", "it.pt", "it.pth", "it.bin", "it.gguf", "it"])
def test_only_safetensors_are_read(name: str, checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    line = _tell(tmp_path / name, checkpoints)
    assert "only safetensors are read" in line
    assert "use the .safetensors file" in line


def test_a_file_that_only_says_it_is_one(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "it.safetensors").write_bytes(b"no header")
    assert "is no safetensors file" in _tell(tmp_path / "it.safetensors", checkpoints)


def test_a_file_that_is_not_there(checkpoints: Path, tmp_path: Path) -> None:
    line = _tell(tmp_path / "it.safetensors", checkpoints)
    assert "neither a folder, a safetensors file nor a shipped model" in line
