"""`laptop`: what an image of SD 1.5's architecture takes on a CPU, by one way after another.

Each way runs alone in a process of its own, once a round, so that all find the same machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from engines.options import CacheOption, check_choice
from engines.order import DEFAULT_CACHE_DIR
from loadtests.gpu.models import SD15, TINY, Shape, save_checkpoint
from loadtests.laptop.page import Found, How, write_page
from loadtests.laptop.task import CLOCKS, Drawn, Kind, Task
from loadtests.peers.environment import ensure_python, pin_of
from loadtests.report import RESULTS, ROOT, OutOption

SD_CPP = "stable-diffusion-cpp-python"
OPENVINO = "OpenVINO, which FastSD CPU draws with"
KINDS = (
    Kind("onnxruntime", "Fourstep, ONNX Runtime", "fp32"),
    Kind("onnxruntime", "Fourstep, ONNX Runtime", "int8"),
    Kind("openvino_backend", "Fourstep, OpenVINO", "int8"),
    Kind("torch_cpu", "Fourstep, torch", "fp32"),
    Kind("torch_cpu", "Fourstep, torch", "bf16"),
    Kind("diffusers", "diffusers", "fp32"),
    Kind("diffusers", "diffusers", "bf16"),
    Kind("openvino", OPENVINO, "fp32", ("openvino",)),
    Kind("openvino", OPENVINO, "bf16", ("openvino",)),
    Kind("openvino", OPENVINO, "w8", ("openvino", "nncf")),
    Kind("openvino", OPENVINO, "int8", ("openvino", "nncf")),
    Kind("sd_cpp", "stable-diffusion.cpp, weights in fp16", "fp32", (SD_CPP,)),
)  # fmt: skip
BY_LABEL = {kind.label: kind for kind in KINDS}
TIMEOUT_S = 1800.0  # of one process


def laptop(
    kind: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(BY_LABEL)}; repeat. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=9, help="Times that each draws.")] = 2,
    steps: Annotated[int, typer.Option(min=1, max=50, help="Of the image that is drawn.")] = 4,
    num_threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: the process's own seconds, for busy machines.")
    ] = "wall",
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny architecture: a trial.")] = False,
    add: Annotated[
        bool, typer.Option("--add", help="To the page in --out, of other kinds: a run in parts.")
    ] = False,
    beside: Annotated[str, typer.Option(help="What else the machine did, for the page.")] = "",
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Seconds of an image of SD 1.5's architecture at 512x512 on this CPU, beside others' ways."""
    for label in kind or ():
        if label not in BY_LABEL:
            raise typer.BadParameter(f"--kind is {label!r}; known are {', '.join(BY_LABEL)}")
    check_choice("--clock", clock, tuple(CLOCKS))
    threads = num_threads or os.cpu_count() or 1
    chosen = [BY_LABEL[label] for label in kind] if kind else list(KINDS)
    shape = dataclasses.replace(TINY if tiny else SD15, precision="fp16")
    how = How(rounds, steps, threads, clock)
    found = Found({}, {}, {})
    if add:
        asked = dataclasses.asdict(how) | {"shape": shape.name}
        read_page(found, out, asked, {kind.label for kind in chosen}, _folder(cache_dir, shape))
    run = _in_a_process(cache_dir)
    for _ in compare(found, chosen, how, shape, cache_dir, run):  # a run is long: a page each time
        write_page(found, shape, how, beside).save(out)
    typer.echo((out / "laptop.md").read_text())


def compare(
    found: Found, kinds: list[Kind], how: How, shape: Shape, cache_dir: Path,
    run: Callable[[Kind, Task], Drawn],
) -> Iterator[Kind]:  # fmt: skip
    """What each way draws in each round goes into ``found``, then its kind is given; one that fails
    is absent from then on, with the reason.
    """
    folder = _folder(cache_dir, shape)
    checkpoint, tiny_vae = _checkpoint(folder, shape)
    for index in range(how.rounds):
        for kind in [each for each in kinds if each.label not in found.absent]:
            pixels = _pixels(folder, kind.label)
            task = Task(
                kind.name, kind.precision, checkpoint, tiny_vae, cache_dir, shape.size_px,
                how.num_steps, how.num_threads, how.clock, pixels,
            )  # fmt: skip
            try:
                drawn = run(kind, task)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                found.absent[kind.label] = (kind, f"{error}".splitlines()[-1][:300])
                typer.echo(f"{kind.label}: {found.absent[kind.label][1]}", err=True)
                yield kind
                continue
            found.drawn.setdefault(kind.label, (kind, []))[1].append(drawn)
            found.pixels[kind.label] = np.load(pixels)
            typer.echo(
                f"round {index + 1}/{how.rounds}: {kind.label}, {drawn.image_s:.1f} s", err=True
            )
            yield kind


def _folder(cache_dir: Path, shape: Shape) -> Path:
    return cache_dir / f"laptop-{shape.name.replace(' ', '-')}"


def _pixels(folder: Path, label: str) -> Path:
    return folder / f"{label.replace(':', '-')}.npy"


def read_page(found: Found, out: Path, asked: dict[str, Any], anew: set[str], folder: Path) -> None:
    """What a page has of kinds that are not drawn anew.

    Raises:
        typer.BadParameter: there is none, or it is of another shape or run.
    """
    file = out / "laptop.json"
    if not file.is_file():
        raise typer.BadParameter(f"--add: {out} has no laptop.json yet; run without it first")
    page = json.loads(file.read_text())
    if page["how"] != asked:
        raise typer.BadParameter(
            f"--add: {file} is of {page['how']}, this run is of {asked}; give the same options, or "
            "another --out"
        )
    for label, drawn in page["drawn"].items():
        if label not in anew and _pixels(folder, label).is_file():
            found.drawn[label] = (BY_LABEL[label], [Drawn(**each) for each in drawn])
            found.pixels[label] = np.load(_pixels(folder, label))
    for label, why in page["absent"].items():
        if label not in anew:
            found.absent[label] = (BY_LABEL[label], why)


def _checkpoint(folder: Path, shape: Shape) -> tuple[Path, Path]:
    """Random weights in diffusers' format, kept in the cache, and TAESD's architecture beside."""
    checkpoint, tiny_vae = folder / "model", folder / "tiny-vae"
    if not (tiny_vae / "config.json").exists():
        import torch
        from diffusers import AutoencoderTiny

        save_checkpoint(shape, "cpu", checkpoint)
        torch.manual_seed(1)
        AutoencoderTiny().half().save_pretrained(tiny_vae)
    return checkpoint, tiny_vae


def _in_a_process(cache_dir: Path) -> Callable[[Kind, Task], Drawn]:
    def run(kind: Kind, task: Task) -> Drawn:
        python = Path(sys.executable)
        if kind.packages:
            python = ensure_python(cache_dir, [pin_of("laptop", name) for name in kind.packages])
        if kind.name in ("onnxruntime", "openvino_backend"):
            _build(task)
        done = subprocess.run(
            [str(python), "-m", "loadtests.laptop.ways", task.to_json()],
            cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RuntimeError(f"ended with exit code {done.returncode}: {last}")
        return Drawn.from_json(done.stdout.splitlines()[-1])

    return run


def _build(task: Task) -> None:
    """A bundle in the cache, by a process whose memory is given back."""
    from engines.drawing.model import must_be_built
    from loadtests.laptop.ways import order_of

    if not must_be_built(order_of("onnxruntime", task)):
        return
    code = (
        "import sys; from loadtests.laptop.task import Task; "
        "from loadtests.laptop.ways import order_of; from engines.drawing.model import prepare; "
        "from engines.drawing.calibrating import quantise_parts; "
        "order = order_of('onnxruntime', Task.from_json(sys.argv[1])); "
        "prepare(order, lambda *_: None, quantise_parts)"
    )
    subprocess.run([sys.executable, "-c", code, task.to_json()], cwd=ROOT, check=True)
