"""PixArt-α, δ and Σ agree with diffusers' pipelines, alone and in one batch, at any size."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import LCMScheduler, PixArtAlphaPipeline, StableDiffusionImg2ImgPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import T5EncoderModel

from engines.build.checkpoint import load_facts, load_pipeline, tokenizer_of
from engines.build.plan import PlanTarget, check_target
from engines.build.profiles import profiles_of
from engines.build.source import Overrides
from engines.drawing.fitting import fit
from engines.drawing.parity import MAX_RELATIVE_ERROR_INT8, compare
from engines.drawing.runner import Runner
from engines.errors import CheckpointError, InvalidInput
from engines.facts import Facts
from engines.families import pixart
from engines.families.recipe import Blend, Recipe
from tests.engines.checkpoints import make_lora, make_pixart_checkpoint, with_scheduler
from tests.engines.peers import (
    Peer,
    Result,
    assert_agree,
    assert_alone,
    draw_together,
    open_runner,
    psnr_db,
)
from tests.engines.peers import recipe as plain_recipe

IMAGE = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8).repeat(32, 0).repeat(32, 1)
WAYS: list[dict[str, Any]] = [
    {"num_steps": 1},
    {"num_steps": 2, "guidance_scale": 3.0},
    {"num_steps": 3, "guidance_scale": 2.0, "negative_prompt": "a blue ball"},
    {"num_steps": 4, "prompt": "  A Red CUBE\n"},
    {"num_steps": 5, "width_px": 320, "height_px": 192},  # a bin
    {"num_steps": 6, "width_px": 240, "height_px": 272, "guidance_scale": 2.0},  # a bin
    {"num_steps": 7, "width_px": 288, "height_px": 256},  # drawn at 272 x 240
    {"num_steps": 8, "width_px": 128, "height_px": 512, "prompt": "long " * 60},
    {"num_steps": 4, "prompt": "marks </s> in it, and <pad> too", "guidance_scale": 1.5},
    {"num_steps": 2, "prompt": ""},
]
OTHERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "tcd")


def recipe(**changes: Any) -> Recipe:
    return plain_recipe(**({"width_px": 256, "height_px": 256} | changes))


RECIPES = [
    *(recipe(**way, seed=seed) for seed, way in enumerate(WAYS)),
    # Of one step diffusers' pipeline takes what a scheduler calls x₀, whatever its last step gives.
    *(
        recipe(**WAYS[1 + (2 * k + turn) % 7], sampler=sampler, seed=k)
        for k, sampler in enumerate(OTHERS)
        for turn in range(2)
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pixart_checkpoint(tmp_path_factory.mktemp("pixart") / "tiny-pixart")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return folder


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def torch_runner(folder: Path, cache_dir: Path) -> Iterator[Runner]:
    opened = open_runner(folder, "torch", cache_dir)
    yield opened
    opened.close()


def test_alone(runner: Runner, peer: Peer) -> None:
    assert_alone(runner, peer, RECIPES)


def test_mixed_in_one_batch(runner: Runner, peer: Peer) -> None:
    """Samplers, step counts, guidance and sizes of one bin share every call."""
    mixed = [RECIPES[k] for k in np.random.default_rng(1).permutation(len(RECIPES))]
    for first in range(0, len(mixed), 8):
        batch = mixed[first : first + 8]
        for wanted, ours in zip(batch, draw_together(runner, batch), strict=True):
            assert_agree(ours, peer.draw(wanted), wanted)


def test_a_model_that_is_told_the_size(cache_dir: Path, tmp_path: Path) -> None:
    checkpoint = make_pixart_checkpoint(tmp_path / "told", sample_size=128)
    kin, others = open_runner(checkpoint, "torch", cache_dir), Peer(checkpoint)
    wanted = [
        recipe(width_px=1024, height_px=1024, num_steps=2),
        recipe(width_px=1536, height_px=528, num_steps=1),  # drawn at 1728 x 576
        recipe(width_px=768, height_px=1280, num_steps=1, sampler="euler", guidance_scale=2.0),
    ]
    for each, ours in zip(wanted, draw_together(kin, wanted), strict=True):
        assert_agree(ours, others.draw(each), each)


ALPHA = {  # of PixArt-XL-2-1024-MS
    "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++",
    "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "solver_order": 2,
    "solver_type": "midpoint", "lower_order_final": True, "prediction_type": "epsilon",
    "timestep_spacing": "linspace", "variance_type": None, "thresholding": False,
}  # fmt: skip


def test_alpha_with_its_own_scheduler(folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Of many steps, with guidance."""
    checkpoint = with_scheduler(ALPHA, folder, tmp_path / "alpha")
    kin = open_runner(checkpoint, "torch", cache_dir)
    own = kin.default_recipe(seed=3, prompt="a red cube", num_steps=kin.info.default_num_steps)
    assert (own.sampler, own.num_steps, own.guidance_scale) == ("dpmpp_2m", 20, 4.5)
    (ours,) = draw_together(kin, [own])
    assert_agree(ours, Peer(checkpoint).draw(own), own)


def test_sigma(cache_dir: Path, tmp_path: Path) -> None:
    """Another pipeline, with a longer window; half as many channels, without a variance."""
    checkpoint = make_pixart_checkpoint(tmp_path / "sigma", sigma=True, learned_variance=False)
    kin, others = open_runner(checkpoint, "torch", cache_dir), Peer(checkpoint)
    wanted = [
        recipe(prompt="word " * 40),
        recipe(prompt="word " * 90, width_px=320, height_px=192, guidance_scale=2.0),
    ]
    for each, ours in zip(wanted, draw_together(kin, wanted), strict=True):
        assert_agree(ours, others.draw(each), each)
    assert kin.start(wanted[0]).num_truncated_tokens == (0,)
    assert kin.start(wanted[1]).num_truncated_tokens[0] > 0


def test_from_an_image_at_the_images_own_size(
    torch_runner: Runner, folder: Path, peer: Peer
) -> None:
    """diffusers has no such pipeline: theirs from text goes on from where Stable Diffusion's from
    an image begins.
    """
    wanted = recipe(image=IMAGE, width_px=288, height_px=224, strength=0.5, num_steps=4)
    mixed = [wanted, recipe(num_steps=3), dataclasses.replace(wanted, seed=8, guidance_scale=2.0)]
    ours, _, guided = draw_together(torch_runner, mixed)
    for drawn, each in ((ours, wanted), (guided, mixed[2])):
        assert_agree(drawn, _from_image(folder, each), each)


def _from_image(folder: Path, wanted: Recipe) -> Result:
    pipeline = PixArtAlphaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(wanted.num_steps)
    timesteps = scheduler.timesteps[-int(wanted.num_steps * wanted.strength) :]
    generator = torch.Generator().manual_seed(wanted.seed)
    beginner = SimpleNamespace(vae=pipeline.vae, scheduler=scheduler)
    image = pipeline.image_processor.preprocess(Image.fromarray(wanted.image))
    with torch.inference_mode():
        latents = StableDiffusionImg2ImgPipeline.prepare_latents(
            beginner, image, timesteps[:1], 1, 1, torch.float32, "cpu", generator
        )
        drawn = pipeline(
            wanted.prompt, "", timesteps=timesteps.tolist(), latents=latents, generator=generator,
            guidance_scale=wanted.guidance_scale, height=wanted.height_px, width=wanted.width_px,
            clean_caption=False, use_resolution_binning=False, output_type="latent",
        ).images  # fmt: skip
        decoded = pipeline.vae.decode(drawn / pipeline.vae.config.scaling_factor).sample
    pixels = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
    return Result(drawn[0].numpy(), np.asarray(pixels))


def test_a_blend_lets_both_prompts_through(torch_runner: Runner) -> None:
    def masked(*blends: Blend) -> list[int]:
        row = torch_runner.start(recipe(prompt="a cube", blends=blends))
        torch_runner.encode_text([row])
        (mask,) = row.condition("prompt_attention_mask")
        return [int(mask.sum()), int(mask.max())]

    short, long = masked(), masked(Blend("a much longer prompt", 1.0))
    assert short < long
    assert masked(Blend("a much longer prompt", 0.0)) == short
    assert masked(Blend("a much longer prompt", 0.5)) == long


@pytest.mark.parametrize("drawn", [(832, 1152), (576, 1664)])
def test_every_size_is_what_was_asked_for(drawn: tuple[int, int]) -> None:
    """Also where the product of ratio and side comes out a hair below it."""
    pixels = np.zeros((*drawn, 3), np.uint8)
    for height in range(512, 2049, 496):
        for width in range(512, 2049, 496):
            wanted = recipe(width_px=width, height_px=height)
            assert fit(pixels, wanted).shape == (height, width, 3)


TEXTS = [f"{size} {colour} cube" for size in ("a large", "a small") for colour in ("red", "blue")]
TARGETS = [  # as in the LoRA training script of PixArt's authors
    "to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "proj", "linear", "linear_1", "linear_2",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_loras_as_peft_saves_them(folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    merged = PixArtAlphaPipeline.from_pretrained(folder)
    get_peft_model(merged.transformer, config).save_pretrained(tmp_path / "lora")
    merged = PixArtAlphaPipeline.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(merged.transformer, tmp_path / "lora")
    merged.register_modules(transformer=adapted.merge_and_unload())
    merged.save_pretrained(tmp_path / "merged")
    kin = open_runner(folder, "torch", cache_dir, loras={"it": tmp_path / "lora"})
    wanted = recipe(num_steps=2, guidance_scale=2.0, loras={"it": 1.0})
    plain = dataclasses.replace(wanted, loras={})
    (ours,) = draw_together(kin, [wanted])
    assert_agree(ours, Peer(tmp_path / "merged").draw(plain), wanted)
    (without,) = draw_together(kin, [plain])
    assert psnr_db(without.pixels, ours.pixels) < 40  # it does something


def test_a_lora_of_another_family_is_refused(
    folder: Path, checkpoints: Path, cache_dir: Path, tmp_path: Path
) -> None:
    make_lora(checkpoints / "tiny-sd", tmp_path, ["to_q"])
    with pytest.raises(CheckpointError, match=r"which tiny-pixart has not .*made for another"):
        open_runner(folder, "torch", cache_dir, loras={"it": tmp_path})


def test_a_vocabulary_as_sentencepiece_has_it(folder: Path, tmp_path: Path) -> None:
    """PixArt's own folders have no tokenizer.json."""
    shutil.copytree(folder, tmp_path / "x")
    for file in (tmp_path / "x" / "tokenizer").glob("*.json"):
        file.unlink()
    vocabulary = tmp_path / "x" / "tokenizer" / "spiece.model"
    with vocabulary.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=40,
            hard_vocab_limit=False, minloglevel=2,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    ours = tokenizer_of(load_pipeline(tmp_path / "x", "fp32"))
    for text in (*TEXTS, "", "ünknown", "ﬁne  print"):
        assert ours.encode(text).ids == [*theirs.encode(text), theirs.eos_id()], text


def test_what_has_no_unet_takes_none(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="PixArtAlphaPipeline, which has no unet but trans"):
        load_pipeline(folder, "fp32", Overrides(components={"unet": folder}))


def test_plans_are_for_sizes_that_it_draws(folder: Path) -> None:
    pipeline = load_pipeline(folder, "fp32")
    facts = load_facts(folder, pipeline)
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    refused = {(288, 256): "draws at 272x240 and resizes", (264, 256): "multiples of 16 from"}
    for size, message in refused.items():
        target = PlanTarget(engine="tensorrt", sizes_px=(size,), max_batch=2)
        with pytest.raises(InvalidInput, match=message):
            check_target(target, facts)
    target = PlanTarget(engine="tensorrt", sizes_px=((320, 192),), max_batch=1)
    check_target(target, facts)
    shapes = {
        part.name: profiles_of(part, target, facts)[0] for part in pixart.parts(pipeline, facts)
    }
    assert shapes["denoiser"]["sample"][0] == shapes["vae_decoder"]["latents"][0] == (1, 4, 24, 40)
    assert shapes["vae_encoder"]["pixels"][0] == (1, 192, 320, 3)


def test_t5_in_8_bits(folder: Path, torch_runner: Runner, cache_dir: Path) -> None:
    """By torch; pictures are those of float32 but for the rounding of T5's weights."""
    wanted = [recipe(num_steps=4, seed=k, prompt=text) for k, text in enumerate(("a cube", ""))]
    small = open_runner(folder, "torch", cache_dir, t5_int8=True)
    exact, rounded = (draw_together(each, wanted) for each in (torch_runner, small))
    for ours, theirs in zip(rounded, exact, strict=True):
        assert 45 < psnr_db(ours.pixels, theirs.pixels) < 100
    found = compare(torch_runner._model, small._model, ["a cube"], ["text_encoder"])
    off = {(result.part, result.max_relative_error) for result in found if result.relative_error}
    assert off == {("text_encoder", MAX_RELATIVE_ERROR_INT8)}
    assert all(result.good for result in found)
    small.close()


def test_t5_in_8_bits_takes_no_lora_on_its_layers(
    folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    layer = "text_encoder.encoder.block.0.layer.0.SelfAttention.q"
    width = T5EncoderModel.from_pretrained(folder / "text_encoder").config.d_model
    pair = {"lora_A": torch.randn(2, width), "lora_B": torch.randn(width, 2)}
    weights = {f"{layer}.{name}.weight": value for name, value in pair.items()}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    wide = open_runner(folder, "torch", cache_dir, loras={"it": tmp_path})
    wanted = recipe(num_steps=1, loras={"it": 1.0})
    draw_together(wide, [wanted])
    with pytest.raises(
        CheckpointError, match=r"LoRA 'it' .* changes text_encoder.* in 8 bits .*--t5-int8"
    ):
        open_runner(folder, "torch", cache_dir, t5_int8=True, loras={"it": tmp_path})


def test_t5_in_8_bits_is_of_t5_alone(folder: Path, checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no T5 encoder.*--t5-int8"):
        load_pipeline(checkpoints / "tiny-sd", "fp32", Overrides(t5_int8=True))
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights as safetensors"):
        load_pipeline(tmp_path / "x", "fp32", Overrides(t5_int8=True))
