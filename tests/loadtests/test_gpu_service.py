"""`loadtests.gpu.service`: what it measures first where its time does not do for all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loadtests.gpu import service
from loadtests.gpu.findings import Findings
from loadtests.gpu.section import Section
from loadtests.scrape import Scrape
from loadtests.serving import Service

SATURATION = [f"saturation, {encoding}" for encoding in ("png", "jpeg", "webp")]


class Bare:
    """An engine that needs no time."""

    def warm_up(self) -> None:
        pass

    def draw(self, recipes: object) -> None:
        pass

    def close(self) -> None:
        pass


class Clock(Section):
    """A section whose time goes by as the work says, and which keeps what was done."""

    now = 0.0

    @property
    def seconds_left(self) -> float:
        return self.ends_at - self.now


def _measure(seconds: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Clock]:
    """A start takes 30 s, a full batch 1 s: rounds are planned with 1.3 × 6, and take 5."""
    section = Clock("service", "cpu", Findings(folder / "gpu.jsonl"), seconds)
    done: list[str] = []

    @contextlib.contextmanager
    def started(*given: object) -> Iterator[Service]:
        done.append(f"start, {given[-1]}")
        section.now += 30
        yield Service("http://nowhere", 0)
        done.append("end")

    def saturation(*given: object) -> None:
        done.append(f"saturation, {given[3]}")
        section.now += 5

    monkeypatch.setattr(service, "time", SimpleNamespace(perf_counter=lambda: section.now))
    monkeypatch.setattr(service.Runner, "open", lambda order: Bare())
    monkeypatch.setattr(service, "recipes_of", lambda *_: [])
    monkeypatch.setattr(service, "_started", started)
    monkeypatch.setattr(service, "_alone", lambda *_: done.append("one client"))
    monkeypatch.setattr(service, "_seconds", lambda call: 1.0)
    monkeypatch.setattr(service, "_saturation", saturation)
    service.measure(section)
    return done, section


@pytest.mark.parametrize(
    ("seconds", "rounds", "again"), [(80, 3, True), (70, 3, False), (41, 1, False), (31, 0, False)]
)
def test_saturation_comes_before_another_start(
    seconds: float, rounds: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, section = _measure(seconds, tmp_path, monkeypatch)
    second = ["start, again", "end"] if again else []
    first = "start, first, kernels to be compiled"
    assert done == [first, "one client", *SATURATION[:rounds], "end", *second]
    assert section.left_out == SATURATION[rounds:] + ([] if again else ["another start"])


def test_a_start_says_what_the_service_says_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def serving(*given: object) -> Iterator[Service]:
        yield Service("http://nowhere", 0)

    said = {"fourstep_load_seconds": 20.0, "fourstep_bundle_build_seconds": 5.0}
    shown = {(name, frozenset[tuple[str, str]]()): seconds for name, seconds in said.items()}
    clock = iter((0.0, 40.0, 42.0) * 2)  # begun, ready, first image
    monkeypatch.setattr(service, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(service, "_service", serving)
    monkeypatch.setattr(service, "_draw", lambda *_: ([], []))
    findings = Findings(tmp_path / "gpu.jsonl")
    findings.begin("service", {})
    section = Section("service", "cpu", findings, time.monotonic() + 60)
    for values in (shown, {}):
        monkeypatch.setattr(service.Scrape, "of", lambda url, values=values: Scrape(values))
        with service._started(section, "model", tmp_path, 64, "first"):
            pass
    telling, silent = findings.chapters({})["service"].tables["start"]
    assert telling == {
        "start": "first", "ready_s": 40, "first_image_s": 42,
        "imports_s": 15, "build_s": 5, "load_s": 20,
    }  # fmt: skip
    assert (silent["ready_s"], silent["imports_s"], silent["load_s"]) == (40, "nan", "nan")
