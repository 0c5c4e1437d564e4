"""`fourstep serve` in processes of its own, for the tests that need all of it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

START_TIMEOUT_S = 1200  # a machine that others use; one that has ended is told of at once
END_TIMEOUT_S = 300  # of a signalled one: it bounds itself, by twice its own time to drain and more


def start(
    model: Path, cache_dir: Path, port: int, *options: str | Path, own_session: bool = False
) -> subprocess.Popen[str]:
    """In a process group and session of its own, if asked to, which its id names then."""
    command = [sys.executable, "-m", "service.cli", "serve", "--model", str(model)]
    command += ["--port", str(port), "--cache-dir", str(cache_dir), *map(str, options)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path.cwd(),
        start_new_session=own_session,
    )  # fmt: skip


def wait_until_ready(process: subprocess.Popen[str], port: int, route: str = "") -> None:
    url = f"http://127.0.0.1:{port}{route}/readyz"
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
            time.sleep(0.5)
        except httpx.HTTPError:
            time.sleep(0.5)
    pytest.fail(f"not ready within {START_TIMEOUT_S} s")
