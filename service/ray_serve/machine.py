"""Whether this machine can serve: port, memory and disk, looked at before anything starts.

Each check raises `ServeError` with the one line that the user sees.
"""

from __future__ import annotations

import ipaddress
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil

GIB = 1024**3
MIN_MEMORY = 2 * GIB  # all processes with one replica of a tiny model: 1.6 GB (PSS, 2026-11-21)
MIN_DISK = 1 * GIB
CGROUP = Path("/sys/fs/cgroup")  # of this process where it runs in a container (cgroup v2)


class ServeError(Exception):
    """This machine cannot serve now; the message is the one line the user sees."""


def check_port(host: str, port: int, *, option: str = "--port") -> None:
    """Raises `ServeError` where nothing can listen on ``host:port``, which ``option`` chooses."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose one with {option}"
            ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_memory(num_replicas: int) -> None:
    """Raises `ServeError` where the replicas would not fit, whatever their model."""
    needed, available = MIN_MEMORY * num_replicas, available_memory()
    if available < needed:
        raise ServeError(
            f"{available / GIB:.1f} GiB of memory are free and {num_replicas} replica(s) need "
            f"{needed / GIB:.1f} GiB or more; stop something, or serve fewer replicas"
        )


def available_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that new processes may take: the machine's, or what a container's limit leaves."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return available  # no container, or not of cgroup v2
    if limit == "max":
        return available
    return min(available, int(limit) - used + int(stat.get("inactive_file", 0)))


def check_disk(folders: Iterable[Path]) -> None:
    """Raises `ServeError` where the filesystem of a folder, or of temporary files, is full."""
    for folder in {*folders, Path(tempfile.gettempdir())}:
        existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < MIN_DISK:
            raise ServeError(
                f"{folder} has {free / GIB:.1f} GiB free and {MIN_DISK / GIB:.0f} GiB is needed; "
                "free some, or choose another place with --cache-dir (TMPDIR for temporary files)"
            )
