"""What a run has found so far: a file of JSON lines, flushed to the disk one by one.

A process that dies takes nothing with it. Every section opens with a line that says for which
machine, device and code it ran; a later opening of the same section stands for it from there on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FINISHED = "finished"


@dataclass
class Chapter:
    """The last run of one section: rows by their table, and how it ended (empty: it has not)."""

    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ended: str = ""
    seconds: float = 0.0

    @property
    def finished(self) -> bool:
        return self.ended == FINISHED


@dataclass(frozen=True)
class Findings:
    """The file at ``path``; any number of processes may append to it, one after the other."""

    path: Path

    def add(self, **line: object) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(plain(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def begin(self, section: str, run: Mapping[str, str]) -> None:
        self.add(section=section, begun=dict(run))

    def row(self, section: str, table: str, values: Mapping[str, object]) -> None:
        self.add(section=section, table=table, row=dict(values))

    def end(self, section: str, how: str, seconds: float) -> None:
        self.add(section=section, ended=how, seconds=seconds)

    def chapters(self, run: Mapping[str, str]) -> dict[str, Chapter]:
        """By section, what its last run under ``run`` has found; others are left alone."""
        found: dict[str, Chapter] = {}
        for line in self._lines():
            name = line["section"]
            if "begun" in line:
                found.pop(name, None)
                if line["begun"] == run:
                    found[name] = Chapter()
            elif name in found and "table" in line:
                found[name].tables.setdefault(line["table"], []).append(line["row"])
            elif name in found:
                found[name].ended, found[name].seconds = line["ended"], line["seconds"]
        return found

    def _lines(self) -> list[dict[str, Any]]:
        """Those that are whole: a machine may go away in the middle of one."""
        lines: list[dict[str, Any]] = []
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines


def plain(value: Any) -> Any:
    """Five digits of every number, and no NaN or infinity, which JSON has not."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value
