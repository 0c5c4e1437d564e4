"""`loadtests.gpu.proofs`: what the page keeps of a pytest that does not leave, or never ends."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadtests.gpu import proofs
from loadtests.gpu.findings import Findings
from loadtests.gpu.section import Section
from tests.waiting import wait_for

TESTS = """
import atexit, pathlib, subprocess, time, pytest
pytestmark = pytest.mark.gpu
child = subprocess.Popen(["sleep", "3600"])
pathlib.Path(__file__).with_name("child").write_text(str(child.pid))
{body}
def test_well(): pass
def test_not_here(): pytest.skip("no such GPU")
def test_wrong(): assert 1 == 2
"""


SLEEP = "pathlib.Path(__file__).with_name('over').touch(); time.sleep(3600)"


class Until(Section):
    """A section whose time is over when a file is there, if not before."""

    over: Path

    @property
    def seconds_left(self) -> float:
        return 0.0 if self.over.exists() else super().seconds_left


def _prove(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, seconds: float) -> Any:
    tests = folder / "test_slow.py"
    tests.write_text(TESTS.format(body=body))
    monkeypatch.setattr(proofs, "FILES", (str(tests), "--noconftest"))
    findings = Findings(folder / "gpu.jsonl")
    section = Until("tests", "cpu", findings, time.monotonic() + seconds)
    section.over = folder / "over"
    findings.begin("tests", {})
    proofs.prove(section)
    return findings.chapters({})["tests"].tables, section.left_out


def _ended(folder: Path) -> bool:
    """Whether the tests' child has, which is nobody's by now; a signal takes a moment to end it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(int((folder / "child").read_text()))
        wait_for(lambda: child.status() == psutil.STATUS_ZOMBIE, "the child's end")
    return True


def test_what_was_counted_stands_although_pytest_does_not_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "LEAVE_S", 0.3)
    leaving = "atexit.register(time.sleep, 3600)"
    tables, left_out = _prove(tmp_path, monkeypatch, leaving, seconds=600)
    (row,) = tables["pytest"]
    assert row == {
        "ended": "killed after its tests, while it was leaving",
        "passed": 1, "skipped": 1, "failure": 1, "error": 0,
    }  # fmt: skip
    assert tables["broken"][0]["test"] == "test_wrong"
    assert tables["skipped because"] == [{"reason": "no such GPU", "tests": 1}]
    assert left_out == []
    assert _ended(tmp_path)


@pytest.mark.parametrize(
    ("body", "passed", "patience_s"),
    [
        (SLEEP, 0, 120.0),
        (f"def test_first(): pass\ndef test_long(): {SLEEP}", 1, 120.0),
        (f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {SLEEP}", 0, 1.0),
    ],
    ids=["while collecting", "amid its tests", "deaf"],
)
def test_tests_that_never_end_are_left_out(
    body: str, passed: int, patience_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they had counted by then stays."""
    monkeypatch.setattr(proofs, "INTERRUPTED_S", patience_s)
    monkeypatch.setattr(proofs, "_workers", list)  # the first is done before the long one
    tables, left_out = _prove(tmp_path, monkeypatch, body, seconds=600)
    (row,) = tables["pytest"]
    assert row["ended"] == "stopped amid its tests, when the time was over"
    assert row["passed"] == passed
    assert "failed" not in tables
    assert left_out == ["pytest"]


def test_what_pytest_leaves_behind_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, _ = _prove(tmp_path, monkeypatch, "", seconds=600)
    assert tables["pytest"][0]["ended"] == "exit code 1"
    assert _ended(tmp_path)
