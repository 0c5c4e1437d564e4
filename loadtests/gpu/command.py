"""`gpu`: all that a GPU can show of this project, in the minutes that one is at hand."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from loadtests.gpu.findings import FINISHED, Findings
from loadtests.gpu.page import write_page
from loadtests.gpu.section import OUT_OF_TIME
from loadtests.report import RESULTS, ROOT, OutOption, machine, sources

LEAST_S = 10.0  # a section needs as much to import torch and to say anything
NOTICE = 0.15  # of a section's limit, by which it should be done of itself


@dataclass(frozen=True)
class Part:
    """A section as the command sees it; ``share`` of the time is what its weight makes of it."""

    name: str
    target: str  # module:function, called with a `loadtests.gpu.section.Section`
    share: float


PARTS = (
    Part("machine", "loadtests.gpu.machine:measure", 1),
    Part("tests", "loadtests.gpu.proofs:prove", 3),
    Part("speed", "loadtests.gpu.speed:measure", 5),
    Part("families", "loadtests.gpu.families:measure", 2),
    Part("kernels", "loadtests.gpu.kernels:measure", 1),
    Part("tensorrt", "loadtests.gpu.plans:try_ways", 2),
    Part("service", "loadtests.gpu.service:measure", 4),
)


def gpu(
    minutes: Annotated[float, typer.Option(min=0.1, max=120, help="Of the whole run.")] = 8,
    device: Annotated[str, typer.Option(help="cuda or cpu; empty: cuda, if it is there.")] = "",
    section: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(part.name for part in PARTS)}; repeat; default: all."),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Run again what has run to its end.")] = False,
    out: OutOption = RESULTS,
) -> None:
    """Machine, GPU tests, speed, families, TensorRT and service on this GPU; written as it goes.

    Each section is a process of its own with its own limit: one that crashes, hangs or loses the
    GPU costs itself alone. Sections that have run to their end on this machine, device and code are
    kept. `--device cpu` walks the same way over tiny shapes.
    """
    chosen = _device(device)
    known = {part.name: part for part in PARTS}
    for name in section or ():
        if name not in known:
            raise typer.BadParameter(f"--section is {name!r}; use {', '.join(known)}")
    parts = [known[name] for name in dict.fromkeys(section or known)]
    failed = run_parts(parts, chosen, 60 * minutes, out, fresh=fresh)
    if failed:
        typer.echo(f"not to their end: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _device(asked: str) -> str:
    import torch

    if asked not in ("", "cuda", "cpu"):
        raise typer.BadParameter(f"--device is {asked!r}; use cuda or cpu")
    if asked != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "torch finds no NVIDIA GPU here; --device cpu walks the same way over tiny shapes"
        )
    return asked or "cuda"


def run_parts(
    parts: Sequence[Part], device: str, seconds: float, out: Path, *, fresh: bool = False
) -> list[str]:
    """Run those that have not run to their end yet; returns the names of those that still have not.

    The page is there from the first section on. What one leaves of its time, the rest has.
    """
    ends_at = time.monotonic() + seconds
    run = {"machine": machine(), "device": device, "sources": sources()}
    findings = Findings(out / "gpu.jsonl")
    known = {} if fresh else findings.chapters(run)
    open_ = [part for part in parts if part.name not in known or not known[part.name].finished]
    for index, part in enumerate(open_):
        left = ends_at - time.monotonic()
        limit = left * part.share / sum(each.share for each in open_[index:])
        typer.echo(f"{part.name}: at most {limit:.0f} s", err=True)
        findings.begin(part.name, run)
        begun = time.monotonic()
        how = "no time left" if limit < LEAST_S else _run(part, device, findings, limit)
        findings.end(part.name, how, time.monotonic() - begun)
        typer.echo(f"{part.name}: {how}", err=True)
        write_page(findings.chapters(run), run, out)
    typer.echo(write_page(findings.chapters(run), run, out))
    chapters = findings.chapters(run)
    return [part.name for part in parts if not chapters[part.name].finished]


def _run(part: Part, device: str, findings: Findings, limit_s: float) -> str:
    """How the section's process ended. Its output goes into a log beside the findings."""
    command = [sys.executable, "-m", "loadtests.gpu", part.name, part.target, "--device", device]
    command += ["--findings", str(findings.path), "--seconds", f"{limit_s * (1 - NOTICE):.1f}"]
    with findings.path.with_name("gpu.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"ended at its limit of {limit_s:.0f} s"
        finally:
            _end(process)
    ends = {0: FINISHED, OUT_OF_TIME: "done as far as its time went"}
    return ends.get(code, f"ended with exit code {code}, see gpu.log")


def _environment() -> Mapping[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a section and what it has started, in whatever session that is."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()
