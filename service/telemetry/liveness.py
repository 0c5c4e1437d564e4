"""Which processes that write into a node's metrics folder are still alive, said by the kernel.

Each holds a lock on a file of its own, which ends with it however it ends. Process ids alone would
not do: they are used again, and mean nothing to a container beside the replicas' own.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

_held: dict[Path, int] = {}  # file → descriptor, open until this process ends


def declare_alive(folder: Path, on_stale: Callable[[int], None]) -> None:
    """Lock this process's file. ``on_stale`` forgets what an earlier process of its id has left.

    To be called before anything is written for this process. A second call does nothing.
    """
    file = _file(folder, os.getpid())
    if file in _held:
        return
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # held elsewhere for moments only, by find_dead
    on_stale(os.getpid())
    _held[file] = descriptor


def find_dead(folder: Path) -> set[int]:
    """Ids of the processes that have ended. Changes nothing: the folder may be read-only here."""
    dead = set()
    for file in folder.glob("alive_*"):
        if file in _held:
            continue
        with file.open() as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            dead.add(int(file.name.removeprefix("alive_")))
    return dead


def _file(folder: Path, pid: int) -> Path:
    return folder / f"alive_{pid}"
