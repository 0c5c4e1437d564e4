"""What `fourstep serve` refuses before it starts anything."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from service.ray_serve import machine
from service.ray_serve.machine import (
    GIB,
    ServeError,
    available_memory,
    check_disk,
    check_memory,
    check_port,
)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"port {port} on 127.0.0.1 .*--port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_memory_is_counted_per_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 5 * GIB)
    check_memory(2)
    with pytest.raises(ServeError, match=r"5\.0 GiB of memory are free and 3 replica.*6\.0 GiB"):
        check_memory(3)


def test_a_container_limit_counts_where_it_is_lower(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB // 2}\n")
    assert available_memory(tmp_path) == min(GIB * 3 // 2, psutil.virtual_memory().available)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "not" / "yet"
    check_disk([missing])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB // 4))
    with pytest.raises(ServeError, match=r"0\.2 GiB free and 1 GiB is needed.*--cache-dir"):
        check_disk([missing])
