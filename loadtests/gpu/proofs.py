"""The tests that need a GPU, as pytest counts them.

They are named by their file: a machine that lacks Ray could not even collect all others.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from loadtests.gpu.section import Section
from loadtests.report import ROOT

FILES = ("tests/engines/backends/test_gpu.py",)
OUTCOMES = ("failure", "error", "skipped")


def prove(section: Section) -> None:
    """Run them; counts, and the reason of each that did not pass."""
    with tempfile.TemporaryDirectory() as folder, section.attempt("pytest"):
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "ignore", "-q"]
        command += ["-p", "no:cacheprovider", f"--junitxml={junit}", *FILES]
        ended = subprocess.run(command, cwd=ROOT, timeout=section.seconds_left, check=False)
        counts = Counter({"passed": 0, **dict.fromkeys(OUTCOMES, 0)})
        skipped: Counter[str] = Counter()
        for name, outcome, reason in outcomes(junit) if junit.exists() else ():
            counts[outcome] += 1
            if outcome == "skipped":
                skipped[reason] += 1
            elif outcome != "passed":
                section.row("broken", test=name, outcome=outcome, reason=reason[:300])
        for reason, count in skipped.items():
            section.row("skipped because", reason=reason[:300], tests=count)
        section.row("exit code", code=ended.returncode, **counts)


def outcomes(junit: Path) -> Iterator[tuple[str, str, str]]:
    """Test, outcome and reason of every case in a JUnit file."""
    for case in ElementTree.parse(junit).iter("testcase"):
        found = next((case.find(kind) for kind in OUTCOMES if case.find(kind) is not None), None)
        kind, reason = ("passed", "") if found is None else (found.tag, found.get("message", ""))
        yield case.get("name", ""), kind, reason
