"""Replicas in processes of their own, under uvicorn: to be scraped, cancelled and killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from fastapi import FastAPI

from service.ray_serve.environment import free_port
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from tests.waiting import wait_for

START_TIMEOUT_S = 1200.0


def app() -> FastAPI:
    """What such a process serves; its settings come from the environment."""
    return build_app(Replica(load_settings()))


@dataclass(frozen=True)
class ReplicaProcess:
    """A running one; ``folder`` has its node's metrics."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> dict[str, float]:
        """The exposition: series as written → value."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        lines = (line for line in text.splitlines() if not line.startswith("#"))
        return {series: float(value) for series, value in (line.rsplit(" ", 1) for line in lines)}


def leave_when(
    url: str, body: Mapping[str, object], headers: Mapping[str, str], true: Callable[[], bool]
) -> None:
    """Ask for a drawing, and close the connection when something is true, not before."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=60)
    sent = {"content-type": "application/json", **headers}
    connection.request("POST", address.path, json.dumps(body), sent)
    wait_for(true, "its rows run")
    connection.close()


@contextlib.contextmanager
def replica_process(folder: Path, **settings: object) -> Iterator[ReplicaProcess]:
    """Started, not yet ready (see `wait_until_ready`); writes its metrics into ``folder``."""
    port = free_port()
    environment = dict(os.environ) | {"FOURSTEP_METRICS_DIR": str(folder)}
    environment |= {f"FOURSTEP_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "uvicorn", "--factory", "tests.replicas:app"]
    command += ["--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1])
    try:
        yield ReplicaProcess(process, port, folder)
    finally:
        process.kill()
        process.wait()


def wait_until_ready(replica: ReplicaProcess) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert replica.process.poll() is None, "the replica ended before it served"
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{replica.url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"not ready within {START_TIMEOUT_S:.0f} s")
