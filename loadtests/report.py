"""What a command leaves behind: JSON, a Markdown page and PNG plots, side by side in one folder.

Every report names the machine, the commit and the command; figures without them say nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from engines.backends.driver import has_driver
from service.telemetry.versions import version_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
OutOption = Annotated[Path, typer.Option(help="Folder for the JSON, Markdown and PNG files.")]


class Report:
    """Collects one command's outcome, then writes it whole."""

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self._lines = [f"# {title}", ""]
        self._figures: dict[str, Figure] = {}
        self.data: dict[str, Any] = {"about": about()}

    def text(self, paragraph: str) -> None:
        self._lines += [paragraph, ""]

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self._lines += [
            _line(header),
            _line(["---"] * len(header)),
            *(_line([_cell(value) for value in row]) for row in rows),
            "",
        ]

    def figure(self, name: str, figure: Figure, text: str) -> None:
        """``text`` is what the picture shows, for those who do not see it."""
        file = f"{self.name}-{name}.png"
        self._figures[file] = figure
        self._lines += [f"![{text}]({file})", ""]

    def write(self, out: Path) -> None:
        """Write the files and show the page."""
        typer.echo(self.save(out))
        typer.echo(f"written to {out}/{self.name}.*", err=True)

    def save(self, out: Path) -> str:
        """Write the files; returns the page."""
        out.mkdir(parents=True, exist_ok=True)
        where = self.data["about"]
        self.text(
            f"{where['machine']}; {where['date']}, commit {where['commit']}; `{where['command']}`"
        )
        page = "\n".join(self._lines)
        (out / f"{self.name}.json").write_text(json.dumps(self.data, indent=1) + "\n")
        (out / f"{self.name}.md").write_text(page)
        for file, figure in self._figures.items():
            figure.savefig(out / file)
        return page


def about() -> dict[str, Any]:
    """Machine, commit and command of this run."""
    versions = {name: version_of(name) for name in ("torch", "onnxruntime", "ray")}
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "loadtests", *sys.argv[1:]]),
        "versions": versions,
    }


def machine() -> str:
    """`2 cores of an AMD EPYC, 24 GB, no GPU`."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gib = round(psutil.virtual_memory().total / 2**30)
    return f"{len(os.sched_getaffinity(0))} cores of an {cpu}, {gib} GiB, {_gpu()}"


def _gpu() -> str:
    if not has_driver():
        return "no GPU"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no usable GPU"


def commit() -> str:
    """The tree's commit, marked where files differ from it; outside a repository its sources'."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"none, sources {sources()}"
    return found.stdout.strip()


def sources() -> str:
    """A digest of the code that is measured and measures: equal digests, comparable figures."""
    digest = hashlib.sha256()
    for package in ("engines", "service", "loadtests"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:7]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: object) -> str:
    if isinstance(value, float):
        if value != value:
            return "–"
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
