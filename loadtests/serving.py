"""Applications under test, each in processes of its own: start, wait, watch, end.

Only processes started here, and their descendants, are ever ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from service.ray_serve.environment import free_port, haproxy_available
from service.ray_serve.serve_config import IMPORT_PATH

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 1200.0  # a machine that others use; one that ends by itself is told of at once
END_TIMEOUT_S = 45.0
MIB = 2**20


class StartFailed(RuntimeError):
    """An application ended before it served, or did not answer in time."""


@dataclass(frozen=True)
class Service:
    """An application that runs; ``pid`` is the ancestor of all its processes.

    ``probes`` is the URL where it is asked whether it is well, which may have a port of its own.
    """

    url: str
    pid: int
    probes: str = ""

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def cpu_s(self) -> float:
        """CPU seconds used so far, over all processes that are alive."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def memory_mib(self) -> float:
        """Proportional set size over all processes: shared pages count once."""
        total = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss / MIB
        return total


@contextlib.contextmanager
def running(
    command: Sequence[str],
    port: int,
    ready_path: str,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[Service]:
    """Start ``command``, wait until it answers on ``port``, end it and all it started.

    Raises:
        StartFailed: the end of its output is in the message.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": _path(), **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at our terminal is ours to pass on
        )
        service = Service(f"http://127.0.0.1:{port}", process.pid)
        try:
            _wait(process, service.url + ready_path, output, timeout_s)
            yield service
        finally:
            _end(process, service)


@contextlib.contextmanager
def fourstep(
    model: str,
    cache_dir: Path,
    *,
    replicas: int = 1,
    gpu_shaped: bool = False,
    engine: str = "onnxruntime",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """The product, as `fourstep serve` serves it; ``gpu_shaped`` puts a timing double under it."""
    port, probe_port = free_port(), free_port()
    command = [sys.executable, "-m", "loadtests.peers.fourstep", "--probe-port", str(probe_port)]
    command += ["--model", model, "--cache-dir", str(cache_dir), "--port", str(port)]
    command += [
        "--engine",
        engine,
        "--workers",
        str(replicas),
        *(["--gpu-shaped"] if gpu_shaped else []),
    ]
    with running(command, port, "/readyz", environment) as service:
        probes = f"http://127.0.0.1:{probe_port}" if haproxy_available() else service.url
        yield dataclasses.replace(service, probes=probes)


@contextlib.contextmanager
def several(
    applications: Mapping[str, Mapping[str, Any]], timeout_s: float = START_TIMEOUT_S
) -> Iterator[dict[str, Service]]:
    """Applications of one `fourstep serve --config`, by name, each under a path of its name; their
    settings are given.
    """
    port, probe_port = free_port(), free_port()
    config = {
        "applications": [
            {"name": name, "route_prefix": f"/{name}", "import_path": IMPORT_PATH, "args": dict(a)}
            for name, a in applications.items()
        ]
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(json.dumps(config))  # which YAML takes
        command = [sys.executable, "-m", "service.cli", "serve", "--config", str(file)]
        command += ["--port", str(port), "--probe-port", str(probe_port)]
        first, *others = applications
        with running(command, port, f"/{first}/readyz", timeout_s=timeout_s) as service:
            for name in others:
                _await(f"{service.url}/{name}/readyz", timeout_s)
            yield {
                name: dataclasses.replace(service, url=f"{service.url}/{name}")
                for name in applications
            }


def _await(url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not _answers(url):
        if time.monotonic() > deadline:
            raise StartFailed(f"{url} does not answer within {timeout_s:.0f} s")
        time.sleep(0.25)


def _answers(url: str) -> bool:
    with (
        contextlib.suppress(urllib.error.URLError, OSError),
        urllib.request.urlopen(url, timeout=5) as answer,
    ):
        return bool(answer.status == 200)
    return False


def _path() -> str:
    """This tree, then whatever Python was told of packages."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _wait(process: subprocess.Popen[bytes], url: str, output: object, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartFailed(f"the application ended before it served: {_tail(output)}")
        if _answers(url):
            return
        time.sleep(0.25)
    raise StartFailed(f"the application does not answer within {timeout_s:.0f} s: {_tail(output)}")


def _tail(output: object) -> str:
    output.seek(0)  # type: ignore[attr-defined]
    return output.read().decode(errors="replace")[-3000:]  # type: ignore[attr-defined,no-any-return]


def _end(process: subprocess.Popen[bytes], service: Service) -> None:
    started = service.processes()
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)
    for left in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()
    psutil.wait_procs(started, timeout=5)
