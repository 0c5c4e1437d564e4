"""The tests that need a GPU, as pytest counts them.

They are named by their file: a machine that lacks Ray could not even collect all others.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from loadtests.gpu.section import Section
from loadtests.report import ROOT

FILES = tuple(f"tests/engines/backends/test_{name}.py" for name in ("gpu", "gpu_families"))
OUTCOMES = ("failure", "error", "skipped")
# For leaving, once all is counted. On an H200 4 s were not enough (2026-11-26), on two cores that
# others keep busy 10 (2026-11-28).
LEAVE_S = 30.0
INTERRUPTED_S = 4.0  # for writing down what was counted, once it is told to stop


def prove(section: Section) -> None:
    """Run them; counts, and the reason of each that did not pass."""
    with tempfile.TemporaryDirectory() as folder, section.attempt("pytest"):
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "ignore", "-q"]
        command += ["-p", "no:cacheprovider", f"--junitxml={junit}", *_workers(), *FILES]
        with _group(command) as process:
            ended = _ending(process, junit, section)
        counts = Counter({"passed": 0, **dict.fromkeys(OUTCOMES, 0)})
        skipped: Counter[str] = Counter()
        for name, outcome, reason in outcomes(junit):
            counts[outcome] += 1
            if outcome == "skipped":
                skipped[reason] += 1
            elif outcome != "passed":
                section.row("broken", test=name, outcome=outcome, reason=reason[:300])
        for reason, count in skipped.items():
            section.row("skipped because", reason=reason[:300], tests=count)
        section.row("pytest", ended=ended, **counts)


def _workers() -> list[str]:
    """Side by side where there are cores for it: most of a test's time is compiling and loading."""
    count = min(8, (os.cpu_count() or 1) // 2)
    return ["-n", str(count)] if count > 1 and importlib.util.find_spec("xdist") else []


@contextlib.contextmanager
def _group(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process group of its own, which is ended with all that is left in it."""
    process = subprocess.Popen(command, cwd=ROOT, process_group=0)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(process: subprocess.Popen[bytes], junit: Path, section: Section) -> str:
    """Wait for it; how it ended. Its junit file, the last that it writes, may stand before that."""
    while process.poll() is None and not _is_whole(junit):
        if section.seconds_left <= 0:
            section.left_out.append("pytest")
            process.send_signal(signal.SIGINT)  # to it alone, not to its workers
            _wait_for(lambda: process.poll() is not None or _is_whole(junit), INTERRUPTED_S)
            return "stopped amid its tests, when the time was over"
        time.sleep(0.1)
    try:
        code = process.wait(max(0, min(LEAVE_S, section.seconds_left)))
    except subprocess.TimeoutExpired:
        return "killed after its tests, while it was leaving"
    return f"exit code {code}"


def _wait_for(done: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.1)


def _is_whole(junit: Path) -> bool:
    """Whether a JUnit file is there to its end: it is opened well before it is filled."""
    return junit.exists() and junit.read_bytes().rstrip().endswith(b"</testsuites>")


def outcomes(junit: Path) -> Iterator[tuple[str, str, str]]:
    """Test, outcome and reason of every case in a JUnit file; none where it is not there, or half.

    One amid which pytest was stopped has a case like those that passed, and is the last: the suite
    does not count it.
    """
    if not _is_whole(junit):
        return
    suite = next(ElementTree.parse(junit).iter("testsuite"))
    for case in suite.findall("testcase")[: int(suite.get("tests", 0))]:
        found = next((case.find(kind) for kind in OUTCOMES if case.find(kind) is not None), None)
        kind, reason = ("passed", "") if found is None else (found.tag, found.get("message", ""))
        yield case.get("name", ""), kind, reason
