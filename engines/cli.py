"""The command's engine half: build, inspect, generate. Heavy imports wait until they are needed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.distill.cli import app as distill
from engines.errors import EngineError

app = typer.Typer(
    name="fourstep",
    help="Production serving for few-step diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(distill, name="distill")
ModelArgument = Annotated[
    str, typer.Argument(help="Diffusers folder, bundle, hub id or a shipped model's name.")
]
CacheOption = Annotated[
    Path, typer.Option(help="Where built bundles are kept.", envvar="FOURSTEP_CACHE_DIR")
]
DEFAULT_CACHE = Path("~/.cache/fourstep").expanduser()


def show_progress(what: str, done: int, total: int) -> None:
    """One line for each finished piece of a build, on stderr."""
    typer.echo(f"[{done}/{total}] {what}", err=True)


@app.command()
def build(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    precision: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp32",
    engine: Annotated[str, typer.Option(help="Engine the bundle is for.")] = "onnxruntime",
) -> None:
    """Compile a model's parts into a bundle."""
    from engines.bundle import build_bundle
    from engines.checkpoint import download, resolve
    from engines.model import choose_backend

    if precision not in ("fp32", "fp16"):
        raise typer.BadParameter(f"--precision is {precision!r}; use fp32 or fp16")
    choose_backend(engine)
    begun = time.monotonic()
    bundle = build_bundle(resolve(model) or download(model), precision, out, show_progress)
    size = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    typer.echo(f"{out}: {size / 1e6:.1f} MB in {time.monotonic() - begun:.1f} s")


@app.command()
def inspect(bundle: Annotated[Path, typer.Argument(help="Folder of a bundle.")]) -> None:
    """Verify a bundle's files against its manifest and show what it is."""
    from engines.bundle import open_bundle

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
    for name, entry in manifest["files"].items():
        lines[name] = f"{entry['bytes'] / 1e6:.2f} MB, sha256 {entry['sha256'][:16]}"
    for key, value in lines.items():
        typer.echo(f"{key:<24}{value}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG file to write.")],
    model: Annotated[str, typer.Option(help="As of `build`.")] = "demo-lcm",
    engine: Annotated[str, typer.Option(help="auto, onnxruntime or torch.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or fp16.")] = "auto",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT; default: the model's.")] = "",
    steps: Annotated[int, typer.Option(help="Denoise calls; 0: the model's default.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    sampler: Annotated[str, typer.Option(help="lcm, ddim, euler, ... Default: the model's.")] = "",
    cache_dir: CacheOption = DEFAULT_CACHE,
) -> None:
    """Draw one image without a server."""
    import dataclasses

    from PIL import Image

    from engines.runner import Runner

    begun = time.monotonic()
    runner = Runner.open(
        model, backend=engine, precision=precision, cache_dir=cache_dir, progress=show_progress
    )
    loaded = time.monotonic()
    recipe = runner.default_recipe(seed, prompt, steps or runner.info.default_num_steps)
    changes: dict[str, Any] = {"negative_prompt": negative}
    if size:
        width, found, height = size.partition("x")
        if not (found and width.isdigit() and height.isdigit()):
            raise typer.BadParameter(f"--size is {size!r}; write it as 512x512")
        changes |= {"width_px": int(width), "height_px": int(height)}
    if guidance is not None:
        changes["guidance_scale"] = guidance
    if sampler:
        changes["sampler"] = sampler
    drawing = runner.draw([dataclasses.replace(recipe, **changes)])[0]
    assert drawing.pixels is not None, "draw() finishes what it starts"
    drawn = time.monotonic()
    partial = out.with_name(f".{out.name}.partial")
    Image.fromarray(drawing.pixels).save(partial, "PNG")
    partial.replace(out)
    typer.echo(f"{out}: loaded in {loaded - begun:.1f} s, drawn in {drawn - loaded:.2f} s")


def run(command: typer.Typer) -> None:
    """Run a command line; every expected failure is one clear line and exit code 1."""
    try:
        command()
    except EngineError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error
