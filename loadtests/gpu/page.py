"""The page of a run, written anew after each section: its findings as they are, table by table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtests.gpu.findings import Chapter
from loadtests.gpu.goals import verdicts
from loadtests.report import Report

TITLES = {
    "machine": "The machine",
    "tests": "GPU tests",
    "speed": "Speed of SD 1.5's architecture, random weights, 4 steps",
    "families": "Speed of other families' architectures, random weights, 4 steps",
    "kernels": "Where the time of a call goes",
    "tensorrt": "TensorRT",
    "service": "The service through HTTP and the bare engine",
}


def write_page(chapters: Mapping[str, Chapter], run: Mapping[str, str], out: Path) -> str:
    """Write ``gpu.json`` and ``gpu.md`` into ``out``; returns the page."""
    report = Report("gpu", f"On {run['device']}: {run['machine']}")
    if run["device"] == "cpu":
        report.text(
            "**Tiny shapes on a CPU, to try the command itself: no figure here means a GPU.**"
        )
    elif reached := verdicts(chapters):
        report.table(["goal", "", "found, the worst", "reached"], reached)
    report.data |= {"run": dict(run), "sections": {}}
    for name, chapter in chapters.items():
        report.data["sections"][name] = dataclasses.asdict(chapter)
        report.text(f"## {TITLES.get(name, name)}")
        ending = f"{chapter.ended or 'running'}, {chapter.seconds:.0f} s"
        report.text(f"{ending[0].upper()}{ending[1:]}.")
        for title, rows in chapter.tables.items():
            _table(report, title, rows)
    return report.save(out)


def _table(report: Report, title: str, rows: list[dict[str, Any]]) -> None:
    """Columns in the order in which rows first name them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    header = [title.replace("|", "/") if i == 0 else _heading(c) for i, c in enumerate(columns)]
    report.table(header, [[_shown(name, row.get(name)) for name in columns] for row in rows])


def _heading(name: str) -> str:
    """`step_ms` → `step, ms`; the unit is the last word of a name."""
    words, _, unit = name.rpartition("_")
    words = words.replace("_", " ")
    if words.endswith(" per"):
        return f"{words.removesuffix(' per')}/{unit}"
    if words and unit in ("ms", "s", "mib"):
        return f"{words}, {unit.replace('mib', 'MiB')}"
    return name.replace("_", " ")


def _shown(name: str, value: Any) -> object:
    if value is None:
        return "–"
    if isinstance(value, float) and name.endswith("share"):
        return f"{value:.0%}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return value
    text = str(value).replace("\n", " ").replace("|", "/")
    return f"`{text}`" if name == "kernel" else text  # some have what would be a link
