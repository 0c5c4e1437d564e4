"""Locks say which processes are alive: held, ended, and one that got an earlier one's id."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from service.telemetry.liveness import declare_alive, find_dead

DECLARE = (
    "import sys, pathlib, service.telemetry.liveness as l; "
    "l.declare_alive(pathlib.Path(sys.argv[1]), print)"
)


def test_the_living_are_left_and_the_dead_are_found(tmp_path: Path) -> None:
    stale: list[int] = []
    declare_alive(tmp_path, stale.append)
    declare_alive(tmp_path, stale.append)
    assert stale == [os.getpid()], "what an earlier process of this id has left is forgotten, once"
    ended = subprocess.Popen([sys.executable, "-c", DECLARE, str(tmp_path)])
    assert ended.wait() == 0
    assert find_dead(tmp_path) == {ended.pid}


def test_a_process_beside_sees_the_same(tmp_path: Path) -> None:
    script = f"{DECLARE}; print('alive', flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as living:
        assert living.stdin is not None
        assert living.stdout is not None
        assert living.stdout.readline() == f"{living.pid}\n"
        assert living.stdout.readline() == "alive\n"
        assert find_dead(tmp_path) == set()
        living.stdin.write("\n")
        living.stdin.flush()
        living.wait()
    assert find_dead(tmp_path) == {living.pid}
