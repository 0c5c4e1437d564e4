"""The command's engine half: build, inspect, generate. Heavy imports wait until they are needed."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.distill.cli import app as distill
from engines.errors import BundleError, EngineError
from engines.facts import DECODERS, EIGHT_BITS, MAX_CHUNKS, Defaults
from engines.options import (
    ArchitectureOption,
    CacheOption,
    DecoderOption,
    DeviceOption,
    EmbeddingOption,
    EngineOption,
    GuidanceOption,
    LoraOption,
    ModelArgument,
    MotionOption,
    PrecisionOption,
    SamplerOption,
    SchedulerOption,
    StepsOption,
    T5Option,
    TilingOption,
    TimestepsOption,
    TinyVaeOption,
    UnetOption,
    VaeOption,
    check_choice,
    parse_embeddings,
    parse_loras,
    parse_options,
    parse_size,
    parse_timesteps,
    parse_weighted,
)
from engines.order import DEFAULT_CACHE_DIR, Order

app = typer.Typer(
    name="fourstep",
    help="Production serving for few-step diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(distill, name="distill")


def show_progress(what: str, done: int, total: int) -> None:
    """One line for each finished piece of a build, on stderr."""
    typer.echo(f"[{done}/{total}] {what}", err=True)


@app.command()
def build(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    precision: Annotated[
        str,
        typer.Option(help="fp32, fp16, bf16, or 8 bits: int8, fp8 (plans alone)."),
    ] = "fp32",
    engine: Annotated[
        str, typer.Option(help="onnxruntime; tensorrt or tensorrt-rtx compile plans too.")
    ] = "onnxruntime",
    size: Annotated[
        list[str] | None,
        typer.Option(help="Plans: WIDTHxHEIGHT, repeat for several; default: the model's."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=63, help="Plans: the largest batch.")] = 8,
    compute_capability: Annotated[
        list[int] | None,
        typer.Option(help="tensorrt-rtx: GPUs to compile for, as 89; default: this machine's."),
    ] = None,
    hardware_compatibility: Annotated[
        str, typer.Option(help="tensorrt: none, ampere_plus or same_compute_capability.")
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option(help="tensorrt: a plan that later versions run too, more slowly.")
    ] = False,
    refit: Annotated[bool, typer.Option(help="Plans whose weights can be replaced.")] = False,
    strip: Annotated[bool, typer.Option(help="Plans without weights, to be refitted.")] = False,
    long_prompts: Annotated[
        bool, typer.Option(help="Plans: for prompts of up to three windows too, longer to build.")
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE or FILE@WEIGHT, a file or hub id, fused into the weights for good; "
            "repeatable."
        ),
    ] = None,
    unet: UnetOption = "",
    vae: VaeOption = "",
    tiny_vae: TinyVaeOption = "",
    motion_adapter: MotionOption = "",
    t5_int8: T5Option = False,
    vae_tiling_px: TilingOption = 0,
    embedding: EmbeddingOption = None,
    scheduler: SchedulerOption = None,
    architecture: ArchitectureOption = "",
    sampler: SamplerOption = "",
    decoder: DecoderOption = "",
    steps: StepsOption = 0,
    timesteps: TimestepsOption = "",
    guidance: GuidanceOption = None,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
) -> None:
    """Compile a model's parts into a bundle."""
    from engines.backends.choice import Machine, check_precision
    from engines.build.bundle import Blueprint, build_bundle
    from engines.build.checkpoint import DTYPES
    from engines.build.plan import HARDWARE_COMPATIBILITY, MODULES, PlanTarget
    from engines.build.source import find, find_lora
    from engines.drawing.calibrating import quantise_parts
    from engines.samplers import SAMPLERS

    check_choice("--engine", engine, ("onnxruntime", *MODULES))
    check_choice("--precision", precision, tuple(DTYPES))
    check_choice("--hardware-compatibility", hardware_compatibility, HARDWARE_COMPATIBILITY)
    check_choice("--sampler", sampler, ("", *SAMPLERS))
    check_choice("--decoder", decoder, ("", *DECODERS))
    check_precision(engine, precision)
    target = None
    if engine in MODULES:
        target = PlanTarget(
            engine=engine,
            sizes_px=tuple(parse_size(text) for text in size or ()),
            max_batch=max_batch,
            compute_capabilities=tuple(compute_capability or ()),
            hardware_compatibility=hardware_compatibility,
            version_compatible=version_compatible,
            refit=refit,
            strip=strip,
            tile_px=vae_tiling_px,
            max_chunks=MAX_CHUNKS if long_prompts else 1,
        )
        target = Machine.here().aim(target)
    begun = time.monotonic()
    loras = [parse_weighted(text) for text in lora or ()]
    fused = tuple((find_lora(name), 1.0 if weight is None else weight) for name, weight in loras)
    defaults = Defaults(
        sampler or None, steps or None, guidance, parse_timesteps(timesteps), decoder or None
    )
    sources = find(
        Order(
            model, unet=unet, vae=vae, tiny_vae=tiny_vae, scheduler=parse_options(scheduler),
            architecture=architecture, embeddings=parse_embeddings(embedding),
            motion_adapter=motion_adapter, t5_int8=t5_int8,
        )
    )  # fmt: skip
    blueprint = Blueprint(sources.model, precision, target, fused, defaults, sources.overrides)
    bundle = build_bundle(blueprint, out, show_progress, cache_dir, quantise_parts)
    num_bytes = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    typer.echo(f"{out}: {num_bytes / 1e6:.1f} MB in {time.monotonic() - begun:.1f} s")


def _build_in_8_bits(order: Order) -> None:
    """Where it is wanted and not there yet: it draws, which loading does not."""
    if order.precision in EIGHT_BITS:
        from engines.drawing.calibrating import quantise_parts
        from engines.drawing.model import prepare

        prepare(order, show_progress, quantise_parts)


@app.command()
def inspect(bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")]) -> None:
    """Verify a bundle's files against its manifest and show what it is."""
    from engines.build.bundle import open_bundle

    manifest = open_bundle(bundle).manifest
    facts = manifest["facts"]
    lines: dict[str, Any] = {
        "source": f"{manifest['source']['name']} ({manifest['source']['sha256'][:16]})",
        "family": facts["family"],
        "precision": f"{manifest['precision']}, opset {manifest['opset']}",
        "built with": ", ".join(f"{k} {v}" for k, v in manifest["built_with"].items()),
        "sizes": f"{facts['min_size_px']} to {facts['max_size_px']} px, multiples of "
        f"{facts['size_multiple_px']}, default {facts['default_size_px']}",
        "sampler": f"{facts['default_sampler']}, {facts['default_num_steps']} steps, guidance "
        f"{facts['default_guidance_scale']}",
    }
    for what, entry in manifest.get("beside", {}).items():  # absent in older manifests
        lines[what] = f"{entry['name']} ({entry['sha256'][:16]})"
    if facts.get("t5_int8"):
        lines["  text_encoder"] = "linear layers in 8 bits"
    for part, found in manifest.get("quantised", {}).items():
        lines[f"  {part} in 8 bits"] = (
            f"{found['num_convolutions']} convolutions, {found.get('num_linears', 0)} linear "
            f"layers, images at {found['psnr_db']} dB of those before at least"
        )
    if timesteps := facts.get("default_timesteps"):
        lines["timesteps"] = ", ".join(map(str, timesteps))
    if plans := manifest.get("plans"):
        target = plans["target"]
        sizes = ", ".join(f"{width}x{height}" for width, height in target["sizes_px"])
        gpus = ", ".join(map(str, target["compute_capabilities"]))
        gpus = (
            f"compute capability {gpus}" if gpus else target.get("gpu") or "the building machine's"
        )
        lines["plans"] = f"{target['engine']} {plans['version']}, {gpus}"
        lines["plans take"] = f"{sizes} px, up to {target['max_batch']} rows"
        for part, report in plans["parts"].items():
            lines[f"  {part}"] = (
                f"{report['num_layers']} layers in, {report['seconds']:.1f} s, "
                f"{report['peak_process_bytes'] / 1e9:.1f} GB at most"
            )
    for name, entry in manifest["files"].items():
        lines[name] = f"{entry['bytes'] / 1e6:.2f} MB, sha256 {entry['sha256'][:16]}"
    for key, value in lines.items():
        typer.echo(f"{key:<23} {value}")


@app.command()
def verify(
    model: ModelArgument,
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    unet: UnetOption = "",
    vae: VaeOption = "",
    tiny_vae: TinyVaeOption = "",
    motion_adapter: MotionOption = "",
    t5_int8: T5Option = False,
    embedding: EmbeddingOption = None,
    scheduler: SchedulerOption = None,
    architecture: ArchitectureOption = "",
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
) -> None:
    """Compare a build with fp32 on ONNX Runtime, part by part; exit code 1 if it is too far off."""
    from engines.drawing.model import load_model
    from engines.drawing.parity import MIN_IMAGE_PSNR_DB, compare, image_psnrs_db

    order = Order(
        model, engine, precision, cache_dir, device=device, unet=unet, vae=vae,
        tiny_vae=tiny_vae, scheduler=parse_options(scheduler), architecture=architecture,
        embeddings=parse_embeddings(embedding), motion_adapter=motion_adapter, t5_int8=t5_int8,
    )  # fmt: skip
    _build_in_8_bits(order)
    exact = dataclasses.replace(
        order, backend="onnxruntime", precision="fp32", device="auto", t5_int8=False
    )
    truth, built = load_model(exact, show_progress), load_model(order, show_progress)
    prompts = ("a red circle on a white background", "two cats asleep on a blue chair, at night")
    results = compare(truth, built, prompts, ["text_encoder"] if t5_int8 else ())
    typer.echo(f"{built.choice.backend}, {built.precision}, against onnxruntime, fp32")
    typer.echo(f"{'output':<28}{'values':>10}{'not finite':>12}{'largest error':>15}  distance")
    for result in results:
        pixels = result.output == "pixels"
        distance = (
            "finite is enough" if result.tells_finite
            else f"{result.psnr_db:.1f} dB (at least {result.min_psnr_db:g})" if pixels
            else f"{result.relative_error:.1e} relative (at most {result.max_relative_error:g})"
        )  # fmt: skip
        typer.echo(
            f"{result.part + '.' + result.output:<28}{result.num_values:>10}"
            f"{result.num_not_finite:>12}{result.largest_error:>15.2g}  {distance}"
        )
    images_db = image_psnrs_db(truth, built, prompts)
    for prompt, found_db in zip(prompts, images_db, strict=True):
        typer.echo(f"{found_db:.1f} dB, image of {prompt!r} (at least {MIN_IMAGE_PSNR_DB:g})")
    too_far = [f"{r.part}.{r.output}" for r in results if not r.good]
    too_far += ["an image"] * (min(images_db) < MIN_IMAGE_PSNR_DB)
    if too_far:
        raise BundleError(
            f"{', '.join(too_far)} of {model} is too far from fp32 on {built.choice.backend} with "
            f"{built.precision}; serve it with --precision bf16 or fp32"
        )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="PNG file to write; of a clip .webp or .gif.")
    ],
    model: Annotated[str, typer.Option(help="As of `build`.")] = "demo-lcm",
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT; default: the model's.")] = "",
    num_frames: Annotated[int, typer.Option(help="Of a clip; 0: the model's default.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoise calls; 0: the model's default.")] = 0,
    timesteps: Annotated[str, typer.Option(help="As of `build`.")] = "",
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    prompt_weighting: Annotated[
        bool, typer.Option(help="Read (word), (word:1.3) and [word] as weights.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    sampler: Annotated[str, typer.Option(help="lcm, ddim, euler, ... Default: the model's.")] = "",
    decoder: DecoderOption = "",
    lora: LoraOption = None,
    unet: UnetOption = "",
    vae: VaeOption = "",
    tiny_vae: TinyVaeOption = "",
    motion_adapter: MotionOption = "",
    t5_int8: T5Option = False,
    vae_tiling_px: TilingOption = 0,
    embedding: EmbeddingOption = None,
    scheduler: SchedulerOption = None,
    architecture: ArchitectureOption = "",
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
) -> None:
    """Draw one image or clip without a server."""
    from engines.drawing.runner import Runner
    from engines.drawing.saving import check_name, save

    begun = time.monotonic()
    paths, weights = parse_loras(lora)
    named = parse_timesteps(timesteps)
    order = Order(
        model, engine, precision, cache_dir, loras=paths, device=device, unet=unet, vae=vae,
        tiny_vae=tiny_vae, vae_tiling_px=vae_tiling_px, scheduler=parse_options(scheduler),
        architecture=architecture, embeddings=parse_embeddings(embedding),
        motion_adapter=motion_adapter, t5_int8=t5_int8,
    )  # fmt: skip
    _build_in_8_bits(order)
    runner = Runner.open(order, progress=show_progress)
    loaded = time.monotonic()
    check_name(out, runner.info.frames_per_second)
    num_steps = steps or len(named or ()) or runner.info.default_num_steps
    recipe = runner.default_recipe(seed, prompt, num_steps)
    sampler = sampler or recipe.sampler
    changes: dict[str, Any] = {
        "sampler": sampler,
        "timesteps": named or runner.info.timesteps_for(sampler, num_steps),
        "negative_prompt": negative,
        "decoder": decoder or recipe.decoder,
        "prompt_weighting": prompt_weighting,
        "loras": {name: weights.get(name, 1.0) for name in paths},
    }
    if size:
        changes["width_px"], changes["height_px"] = parse_size(size)
    if num_frames:
        changes["num_frames"] = num_frames
    if guidance is not None:
        changes["guidance_scale"] = guidance
    drawing = runner.draw([dataclasses.replace(recipe, **changes)])[0]
    assert drawing.pixels is not None, "draw() finishes what it starts"
    drawn = time.monotonic()
    save(drawing.pixels, out, runner.info.frames_per_second)
    typer.echo(f"{out}: loaded in {loaded - begun:.1f} s, drawn in {drawn - loaded:.2f} s")


def run(command: typer.Typer) -> None:
    """Run a command line; every expected failure is one clear line and exit code 1."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # what they would rather have installed
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        command()
    except EngineError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error
