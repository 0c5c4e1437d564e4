"""How fast other families draw: PixArt-δ at 1024 px, and clips of AnimateLCM's architecture.

By the product's own parts and engines, with random weights: diffusers' own forward of a denoiser
eagerly, and what the engine makes of it, as one CUDA graph, with the kernels of that.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from engines.backends.engine import Engine
from engines.backends.torch_engine import TorchEngine
from engines.build.checkpoint import tokenizer_of
from engines.drawing.runner import Runner
from engines.families import animatediff, pixart
from engines.families.family import Family
from engines.families.part import Part
from engines.motion_unet import join
from loadtests.gpu.clocks import device_ms, wait, wall_ms
from loadtests.gpu.kernels import record_kernels
from loadtests.gpu.models import (
    SCHEDULE,
    SD15,
    TINY,
    VAE,
    Shape,
    make_model,
    make_pipeline,
)
from loadtests.gpu.plain import PlainEngine
from loadtests.gpu.section import Section
from loadtests.gpu.speed import forget_peak_memory, peak_memory_mib
from loadtests.peak import DTYPES, matrix_peak, plain_fp32
from loadtests.torch_flops import count_module_flops, inputs_of

NUM_STEPS = 4
SECONDS = {"cuda": 0.3, "cpu": 0.02}  # of one measurement
LEAST = 5  # calls of one: a clip's step of four lanes is 71 TFLOP
PEAK_SIDE = {"cuda": None, "cpu": 256}
# Seconds that a model and a point of it need on a GPU at least: estimates.
MODEL_S, POINT_S = 10.0, 5.0
MIN_AGREEMENT_DB = 20.0
PARTS = ("text_encoder", "denoiser", "vae_decoder")  # of drawing from text
MARKS = {"<pad>": 0, "</s>": 1, "<unk>": 2}  # T5's


@dataclass(frozen=True)
class Subject:
    """A model that is measured, in calls of so many rows."""

    name: str
    family: Family
    make: Callable[[str], tuple[Any, Tokenizer]]  # on a device
    precision: str
    size_px: int
    calls: tuple[tuple[int, float], ...]  # rows and their guidance, above 1 of two lanes each
    num_frames: int = 1


@dataclass(frozen=True)
class PixArt:
    """Of `PixArtTransformer2DModel`, and of the T5 encoder whose captions it takes."""

    precision: str
    transformer: Mapping[str, Any]
    caption: int
    vae: Mapping[str, Any]


# PixArt-alpha/PixArt-LCM-XL-2-1024-MS, transformer/config.json; diffusers' class has the rest of it
# as its defaults: 28 layers, 16 heads of 72.
DELTA = PixArt("fp16", {"sample_size": 128, "cross_attention_dim": 1152}, 4096, {})
TINY_DELTA = PixArt(
    "fp32",
    {
        "sample_size": 16, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
        "cross_attention_dim": 24, "use_additional_conditions": True,
    },
    32, TINY.vae,
)  # fmt: skip
CLIPS = dataclasses.replace(SD15, name="AnimateLCM", unet={"time_cond_proj_dim": None})
TINY_CLIPS = dataclasses.replace(TINY, unet={**TINY.unet, "time_cond_proj_dim": None})
TINY_ADAPTER = {
    "block_out_channels": TINY.unet["block_out_channels"], "motion_layers_per_block": 1,
    "motion_num_attention_heads": 2, "motion_norm_num_groups": 8,
}  # fmt: skip


class PixArtAlphaPipeline(SimpleNamespace):
    """Components under the name by which the family knows how long a caption is."""


def subjects(device: str) -> tuple[Subject, ...]:
    if device == "cuda":
        return (
            Subject(
                "PixArt-δ, 1024 px", pixart, lambda at: make_pixart(DELTA, at), "fp16", 1024,
                ((1, 1.0), (4, 1.0)),
            ),
            Subject(
                "AnimateLCM, 512 px, 16 frames", animatediff, lambda at: make_clips(CLIPS, {}, at),
                "fp16", 512, ((1, 1.0), (1, 1.5), (2, 1.5)), 16,
            ),
        )  # fmt: skip
    return (
        Subject(
            "PixArt-δ, tiny", pixart, lambda at: make_pixart(TINY_DELTA, at), "fp32", 128,
            ((1, 1.0), (2, 1.0)),
        ),
        Subject(
            "AnimateLCM, tiny", animatediff, lambda at: make_clips(TINY_CLIPS, TINY_ADAPTER, at),
            "fp32", 64, ((1, 1.0), (1, 1.5)), 4,
        ),
    )  # fmt: skip


@contextmanager
def _made_in(precision: str, device: str) -> Iterator[None]:
    """Modules that are made inside are of that type and there."""
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[precision])
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def make_pixart(shape: PixArt, device: str) -> tuple[Any, Tokenizer]:
    """Its components; a T5 of two narrow layers, whose captions are as wide as the real one's."""
    from diffusers import AutoencoderKL, LCMScheduler, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(MARKS), d_model=shape.caption, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with _made_in(shape.precision, device):
        transformer = PixArtTransformer2DModel(caption_channels=shape.caption, **shape.transformer)
        vae = AutoencoderKL(sample_size=512, **{**VAE, **shape.vae})
        encoder = T5EncoderModel(config)
    for module in (transformer, vae, encoder):
        module.eval().requires_grad_(False)
    tokenizer = Tokenizer(models.WordLevel(MARKS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", MARKS["</s>"])]
    )
    return PixArtAlphaPipeline(
        transformer=transformer, vae=vae, text_encoder=encoder,
        tokenizer=SimpleNamespace(pad_token_id=MARKS["<pad>"], eos_token_id=MARKS["</s>"]),
        scheduler=LCMScheduler(**SCHEDULE, clip_sample=False),
    ), tokenizer  # fmt: skip


def make_clips(shape: Shape, adapter: Mapping[str, Any], device: str) -> tuple[Any, Tokenizer]:
    """Stable Diffusion's components with motion modules in the UNet: none in the middle, up to 32
    frames.
    """
    from diffusers import MotionAdapter

    pipeline = make_pipeline(shape, device)
    with _made_in(shape.precision, device):
        motion = MotionAdapter(use_motion_mid_block=False, **adapter).eval().requires_grad_(False)
    pipeline.unet = join(pipeline.unet, motion)
    return pipeline, tokenizer_of(pipeline)


def measure(section: Section) -> None:
    """One model after the other; each call of it as far as time goes."""
    plain_fp32()
    device = section.device
    for subject in subjects(device):
        if section.has_time(subject.name, MODEL_S if device == "cuda" else 0):
            with section.attempt(subject.name):
                _measure(section, subject)


def _measure(section: Section, subject: Subject) -> None:
    device = section.device
    begun = time.perf_counter()
    pipeline, tokenizer = subject.make(device)
    facts = subject.family.facts(subject.name, pipeline, {})
    parts = {part.name: part for part in subject.family.parts(pipeline, facts)}
    denoiser, scale = parts["denoiser"], facts.vae_scale_factor
    side = subject.size_px // scale // denoiser.patch
    sizes = {"rows": side, "columns": side, "frames": subject.num_frames}
    # Before an engine fuses it, in place.
    plain = dataclasses.replace(denoiser, module=copy.deepcopy(denoiser.module))
    flops = count_module_flops(
        copy.deepcopy(plain.module), inputs_of(denoiser, {"batch": 1, **sizes})
    )
    engines: dict[str, Engine] = {name: TorchEngine(parts[name], device) for name in PARTS}
    eager = PlainEngine(plain, device)
    lanes = [rows * (1 + (guidance > 1)) for rows, guidance in subject.calls]
    model = make_model(facts, tokenizer, engines, subject.precision, device)
    runner = Runner(model, max_batch=max(lanes))
    wait(device)
    section.row(
        "models", model=subject.name, gflop_of_a_step=flops / 1e9,
        parameters=sum(weight.numel() for weight in plain.module.parameters()),
        max_decode_batch=runner.info.max_decode_batch, make_s=time.perf_counter() - begun,
    )  # fmt: skip
    peak = matrix_peak(subject.precision, device, PEAK_SIDE[device])
    for (rows, guidance), count in zip(subject.calls, lanes, strict=True):
        what = f"{subject.name}, {rows} of {count} lanes"
        if not section.has_time(what, POINT_S if device == "cuda" else 0):
            break
        with section.attempt(what):
            given = random_inputs(denoiser, {"batch": count, **sizes}, device)
            plain.module.to(device)
            found = _step(engines["denoiser"], eager, given, device)
            plain.module.to("cpu")  # the product's own memory is what counts
            forget_peak_memory(device)
            share = count * flops / (found["step_ms"] / 1e3) / peak
            section.row(
                subject.name, rows=rows, lanes=count, **found, step_share=share,
                **_whole(runner, engines, subject, rows, guidance, device),
                memory_mib=peak_memory_mib(device),
            )  # fmt: skip
    lowest = random_inputs(denoiser, {"batch": lanes[0], **sizes}, device)  # the first call's graph
    if section.has_time("kernels", POINT_S if device == "cuda" else 0):
        with section.attempt(f"{subject.name}, kernels"):
            what = f"a step of {subject.name}, {lanes[0]} lanes"
            record_kernels(section, what, lambda: engines["denoiser"].run(lowest))
    what = f"{subject.name}, agreement with fp32"
    if section.has_time(what, POINT_S if device == "cuda" else 0):
        with section.attempt(what):
            plain.module.to(device)
            found_db = _agreement(plain, engines["denoiser"], lowest)
            section.row("a step against fp32", model=subject.name, signal_to_error_db=found_db)
    runner.close()


def _agreement(part: Part, engine: Engine, given: Mapping[str, Tensor]) -> float:
    """Of what a step gives as denoised, in dB, against the part's own weights in fp32, eagerly.

    The part's module is in fp32 afterwards.

    Raises:
        RuntimeError: an error as large as a tenth of the signal, or no numbers.
    """
    exact = part.module.float()
    with torch.inference_mode():
        truth = exact(**given)[1]
        error = (engine.run(given)["denoised"] - truth).square().mean()
        found = 10 * float(torch.log10(truth.square().mean() / error.clamp_min(1e-30)))
    if not found >= MIN_AGREEMENT_DB:
        raise RuntimeError(f"a step is at {found:.1f} dB of fp32, not at {MIN_AGREEMENT_DB}")
    return found


def _step(
    engine: Engine, eager: Engine, given: Mapping[str, Tensor], device: str
) -> dict[str, float]:
    """Of one call: the first, the second, in which a GPU captures it, later ones, and eager ones.

    Raises:
        RuntimeError: a GPU could not capture it.
    """
    found = {}
    for name in ("first_s", "capture_s"):
        begun = time.perf_counter()
        engine.run(given)
        wait(device)
        found[name] = time.perf_counter() - begun
    graphs = getattr(engine, "_graphs", None)
    if graphs is not None and not graphs.num_replays:
        raise RuntimeError("the call could not be captured, see gpu.log")
    found["step_ms"] = device_ms(lambda: engine.run(given), device, SECONDS[device], LEAST)
    found["eager_ms"] = device_ms(lambda: eager.run(given), device, SECONDS[device], LEAST)
    return found


def _whole(
    runner: Runner, engines: Mapping[str, Engine], subject: Subject, rows: int, guidance: float,
    device: str,
) -> dict[str, float]:  # fmt: skip
    """A decode call as the runner makes it, and pictures or clips from text to pixels."""
    recipes = [
        dataclasses.replace(
            runner.default_recipe(seed, num_steps=NUM_STEPS),
            width_px=subject.size_px, height_px=subject.size_px, guidance_scale=guidance,
            num_frames=subject.num_frames,
        )
        for seed in range(rows)
    ]  # fmt: skip
    pictures = min(rows * subject.num_frames, runner.info.max_decode_batch)
    group = runner.start(recipes[0]).group
    channels, *_, high, wide = group.latents
    latents = {"latents": torch.randn(pictures, channels, high, wide, device=device)}
    decode_ms = device_ms(lambda: engines["vae_decoder"].run(latents), device, SECONDS[device])
    all_ms = wall_ms(lambda: runner.draw(recipes), device, SECONDS[device], 3)
    return {
        "decoded_at_once": pictures,
        "decode_ms": decode_ms,
        f"all_{NUM_STEPS}_steps_ms": all_ms,
        f"{'clips' if subject.num_frames > 1 else 'images'}/s": 1e3 * rows / all_ms,
    }


def random_inputs(part: Part, sizes: Mapping[str, int], device: str) -> dict[str, Tensor]:
    """What a denoiser takes, on the device: every row a lane of its own."""
    found = {}
    for name, empty in inputs_of(part, sizes).items():
        batch = len(empty)
        if name == "uncond_index":
            found[name] = torch.arange(batch, device=device)
        elif name == "timestep":
            found[name] = torch.linspace(999, 259, batch, device=device)
        elif name == "guidance" or not empty.dtype.is_floating_point:  # the latter: a mask
            found[name] = torch.ones(empty.shape, dtype=empty.dtype, device=device)
        else:
            found[name] = torch.randn(empty.shape, device=device)
    return found
