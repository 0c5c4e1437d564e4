"""`python -m loadtests.gpu NAME TARGET --device … --findings … --seconds …`: one section, here.

For `loadtests.gpu.command`, which gives each section a process of its own. TARGET is
``module:function``; the exit code is 0 where all of it was done, `OUT_OF_TIME` where some was not.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Annotated

import typer

from loadtests.gpu.findings import Findings
from loadtests.gpu.section import OUT_OF_TIME, Section


def run_section(
    name: str,
    target: str,
    device: Annotated[str, typer.Option()],
    findings: Annotated[Path, typer.Option()],
    seconds: Annotated[float, typer.Option()],
) -> None:
    ends_at = time.monotonic() + seconds
    module, _, function = target.partition(":")
    section = Section(name, device, Findings(findings), ends_at)
    getattr(importlib.import_module(module), function)(section)
    raise typer.Exit(OUT_OF_TIME if section.left_out else 0)


if __name__ == "__main__":
    typer.run(run_section)
