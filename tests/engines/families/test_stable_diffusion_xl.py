"""SDXL, its prunings and few-step kin agree with diffusers' pipelines, alone and in one batch."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from engines.build.bundle import Blueprint, build_bundle
from engines.build.checkpoint import load_pipeline
from engines.drawing.runner import Runner
from engines.errors import CheckpointError
from engines.families import stable_diffusion_xl
from engines.families.recipe import Recipe
from engines.order import Order
from tests.engines.checkpoints import make_lora, make_xl_checkpoint, with_scheduler
from tests.engines.peers import (
    Peer,
    assert_agree,
    assert_alone,
    draw_together,
    open_runner,
    psnr_db,
    recipe,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SAMPLERS = ("lcm", "ddim", "euler", "euler_ancestral", "tcd", "dpmpp_2m", "dpmpp_2m_sde")
IMAGE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)
MASK = np.hypot(*(np.indices((64, 64)) - 30)) < 17
WAYS: list[dict[str, Any]] = [
    {"num_steps": 1},
    {"num_steps": 2, "guidance_scale": 5.0},  # no negative prompt: zeros, pooled ones too
    {"num_steps": 3, "guidance_scale": 5.0, "negative_prompt": ""},  # which is a text
    {"num_steps": 4, "guidance_scale": 1.5, "negative_prompt": "a blue ball"},
    {
        "num_steps": 5,
        "original_size": (512, 768),
        "crops_coords_top_left": (8, 16),
        "target_size": (96, 80),
    },
    {"num_steps": 6, "image": IMAGE, "strength": 0.5, "guidance_scale": 5.0},
    {"num_steps": 7, "image": IMAGE, "strength": 0.3, "negative_prompt": "dark"},
    {"num_steps": 8, "image": IMAGE, "strength": 0.8, "mask": MASK, "guidance_scale": 3.0},
]
RECIPES = [
    recipe(**WAYS[(3 * k + turn) % len(WAYS)], sampler=sampler, seed=k)
    for k, sampler in enumerate(SAMPLERS)
    for turn in range(3)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    make_xl_checkpoint(folder / "tiny-xl")
    make_xl_checkpoint(folder / "tiny-pruned", pruned=True)
    make_xl_checkpoint(folder / "tiny-xl-lcm", embedding=True)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return folder / "tiny-xl"


def test_alone(runner: Runner, peer: Peer) -> None:
    assert_alone(runner, peer, RECIPES)


def test_mixed_in_one_batch(runner: Runner, peer: Peer) -> None:
    """Samplers, step counts, guidance, sizes that are told, images and masks share every call."""
    mixed = [RECIPES[k] for k in np.random.default_rng(1).permutation(len(RECIPES))]
    for first in range(0, len(mixed), 8):
        batch = mixed[first : first + 8]
        for wanted, ours in zip(batch, draw_together(runner, batch), strict=True):
            assert_agree(ours, peer.draw(wanted), wanted)


@pytest.mark.parametrize(
    ("name", "backend"), [("tiny-pruned", "onnxruntime"), ("tiny-xl-lcm", "torch")]
)
def test_prunings_and_guidance_embeddings(
    name: str, backend: str, folder: Path, cache_dir: Path
) -> None:
    kin, others = open_runner(folder / name, backend, cache_dir), Peer(folder / name)
    wanted = [
        recipe(num_steps=4, guidance_scale=4.0, width_px=72, height_px=104),
        recipe(num_steps=3, guidance_scale=4.0, sampler="euler", negative_prompt="dark"),
        recipe(num_steps=4, image=IMAGE, strength=0.5, guidance_scale=2.0),
    ]
    for each, ours in zip(wanted, draw_together(kin, wanted), strict=True):
        assert_agree(ours, others.draw(each), each)
    assert kin.info.guidance_embedding == (name == "tiny-xl-lcm")


LIGHTNING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
FEW_STEPS: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    "turbo": (
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        "euler_ancestral", (1, 2, 3, 4),
    ),
    "lightning": (LIGHTNING, "euler", (2, 4, 8)),
    "lightning-1": (LIGHTNING | {"prediction_type": "sample"}, "euler", (1,)),
    "hyper": ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing",
               "clip_sample": False, "set_alpha_to_one": False}, "ddim", (1, 2, 4, 8)),
    "lcm": ({"_class_name": "LCMScheduler"}, "lcm", (2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW_STEPS)
def test_few_step_checkpoints_by_their_own_scheduler(
    name: str, folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    config, sampler, counts = FEW_STEPS[name]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    checkpoint = with_scheduler(betas | config, folder / "tiny-xl", tmp_path / name)
    kin, others = open_runner(checkpoint, "torch", cache_dir), Peer(checkpoint)
    assert kin.info.default_sampler == sampler
    assert (kin.info.default_num_steps, kin.info.default_guidance_scale) == (4, 1.0)
    for num_steps in counts:
        wanted = recipe(num_steps=num_steps, sampler=sampler, guidance_scale=0.0)
        (ours,) = draw_together(kin, [wanted])
        assert_agree(ours, others.draw(wanted), wanted)


def test_latents_with_a_mean_and_a_deviation(folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "normalised"
    shutil.copytree(folder / "tiny-xl", checkpoint)
    file = checkpoint / "vae" / "config.json"
    told = {"latents_mean": [0.5, -1.0, 2.0, 0.1], "latents_std": [1.5, 2.0, 0.5, 3.0]}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    tried = open_runner(checkpoint, "torch", cache_dir)
    for wanted in (recipe(), recipe(image=IMAGE, strength=0.5, sampler="euler")):
        (ours,) = draw_together(tried, [wanted])
        assert_agree(ours, Peer(checkpoint).draw(wanted), wanted)


def test_a_vae_that_overflows_in_half_precision_stays_whole(folder: Path) -> None:
    """As diffusers decodes with `force_upcast`; the fp16-fix VAE has it off."""
    pipeline = load_pipeline(folder / "tiny-xl", "fp16")
    known = stable_diffusion_xl.facts("x", pipeline, {})
    for forced, dtype in ((False, torch.float16), (True, torch.float32)):
        pipeline.vae.register_to_config(force_upcast=forced)
        parts = {part.name: part.module for part in stable_diffusion_xl.parts(pipeline, known)}
        assert parts["vae_decoder"].vae.dtype == parts["vae_encoder"].vae.dtype == dtype
        assert parts["denoiser"].unet.dtype == torch.float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"requires_aesthetics_score": True, "text_encoder": [None, None]},
            "is a refiner of SDXL, .*; serve the base model",
        ),
        ({"text_encoder_2": [None, None]}, "has None as its text_encoder_2; known are CLIP"),
    ],
)
def test_what_is_no_base_model(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "x"
    shutil.copytree(folder / "tiny-xl", checkpoint)
    index = checkpoint / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        load_pipeline(checkpoint, "fp32")


def test_rows_ignore_their_neighbours(runner: Runner) -> None:
    """Of two sizes, with and without guidance, 1 to 8 steps: pictures are those drawn alone."""
    wanted: list[Recipe] = [
        recipe(num_steps=1 + k, seed=k, sampler=SAMPLERS[k % 7], guidance_scale=1.0 + 4 * (k % 2),
               width_px=(64, 96)[k % 3 == 0])
        for k in range(8)
    ]  # fmt: skip
    together = draw_together(runner, wanted)
    for each, ours in zip(wanted, together, strict=True):
        (alone,) = draw_together(runner, [each])
        assert_agree(ours, alone, each)


TARGETS = {
    "unet": ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.2"],
    "text_encoder": ["q_proj", "fc1"],
    "text_encoder_2": ["v_proj", "out_proj"],
}


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random pairs for UNet and both encoders, as diffusers saves them."""
    out = tmp_path_factory.mktemp("xl-lora")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "tiny-xl")
    torch.manual_seed(5)
    layers = {}
    for name, modules in TARGETS.items():
        config = LoraConfig(r=4, lora_alpha=6, target_modules=modules, init_lora_weights=False)
        getattr(pipeline, name).add_adapter(config)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(getattr(pipeline, name))
        layers[f"{name}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionXLPipeline.save_lora_weights(out, **layers)
    return out / "pytorch_lora_weights.safetensors"


BLOCKS = {  # diffusers' names of what has attention → the original's, of three layers a level
    r"down_blocks\.(\d)\.attentions\.(\d)": lambda m: (
        f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"
    ),
    r"mid_block\.attentions\.0": lambda m: "middle_block.1",
    r"up_blocks\.(\d)\.attentions\.(\d)": lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1",
}


def as_original(layer: str) -> str:
    for pattern, name in BLOCKS.items():
        layer = re.sub(f"^{pattern}", name, layer)
    return layer


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "kohya, the original's blocks"])
def test_loras_of_the_unet_and_both_encoders(
    layout: str, folder: Path, lora: Path, cache_dir: Path, tmp_path: Path
) -> None:
    file = lora
    if layout != "diffusers":
        prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
        state = {}
        for key, matrix in load_file(lora).items():
            part, _, layer = key.partition(".")
            name, half = re.fullmatch(r"(.*)\.lora_([AB])\.weight", layer).groups()  # type: ignore[union-attr]
            if part == "unet" and layout != "kohya":
                name = as_original(name)
            if part != "unet" and not name.startswith("text_model."):
                name = f"text_model.{name}"
            base = f"{prefixes[part]}_{name.replace('.', '_')}"
            state[f"{base}.{'lora_down' if half == 'A' else 'lora_up'}.weight"] = matrix
            state[f"{base}.alpha"] = torch.tensor(6.0)
        file = tmp_path / "kohya.safetensors"
        save_file(state, file)
    order = Order(
        str(folder / "tiny-xl"), backend="torch", cache_dir=cache_dir, loras={"it": file},
        num_threads=1,
    )  # fmt: skip
    kin, others = Runner.open(order), Peer(folder / "tiny-xl", loras={"it": lora})
    for weight in (1.0, 0.5):
        wanted = recipe(sampler="euler", guidance_scale=3.0, loras={"it": weight})
        (ours,) = draw_together(kin, [wanted])
        assert_agree(ours, others.draw(wanted), wanted)
    (plain,) = draw_together(kin, [recipe(sampler="euler", guidance_scale=3.0)])
    assert psnr_db(plain.pixels, ours.pixels) < 40  # it does something


def test_a_lora_of_stable_diffusion_is_refused_and_the_other_way_round(
    folder: Path, lora: Path, checkpoints: Path, cache_dir: Path, tmp_path: Path
) -> None:
    other = make_lora(checkpoints / "tiny-sd", tmp_path / "lora", ["to_q", "to_v"])
    for base, file in ((folder / "tiny-xl", other), (checkpoints / "tiny-sd", lora)):
        why = rf"(in|which) {base.name} (it is|has not) .*it was made for another model$"
        with pytest.raises(CheckpointError, match=rf"^LoRA 'it' \({file}\) changes .*{why}"):
            open_runner(base, "torch", cache_dir, loras={"it": file})
        blueprint = Blueprint(base, loras=((file, 1.0),))
        with pytest.raises(CheckpointError, match=rf"^LoRA '{file}' changes .*{why}"):
            build_bundle(blueprint, tmp_path / "bundle", lambda *_: None)
