"""A Ray cluster of two nodes on this machine, as KubeRay starts one: `ray start`, `serve deploy`.

Every node has the environment of the manifests, with its own folder and free ports.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
DEADLINE_S = 180


def free_port() -> int:
    """Below the ports that the system gives out by itself: it stays free until Ray binds it."""
    for port in random.sample(range(20_000, 29_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


class RayCluster:
    """A head and a worker node; each is one process group that `close` ends."""

    def __init__(self, folder: Path, environment: dict[str, str], *, gpus_per_node: int) -> None:
        self.folder = folder
        self.http_port = free_port()
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment | token
        headers = {"Authorization": f"Bearer {token['RAY_AUTH_TOKEN']}"}
        self._client = httpx.Client(headers=headers, timeout=10)
        self._gpus_per_node = gpus_per_node
        self._address = f"127.0.0.1:{free_port()}"
        self._dashboard = f"http://127.0.0.1:{free_port()}"
        self._temporary = tempfile.mkdtemp(prefix="fs")  # short: Ray's socket names lie in it
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        gcs_port, dashboard_port = self._address.rpartition(":")[2], self._dashboard[-5:]
        head = ["--head", "--port", gcs_port, "--dashboard-port", dashboard_port]
        head += ["--ray-client-server-port", str(free_port()), "--temp-dir", self._temporary]
        self._start("head", head)
        self._wait(lambda: self.applications() == {})
        self._start("worker", ["--address", self._address], worker_port=free_port())

    def _start(self, name: str, options: list[str], worker_port: int | None = None) -> None:
        own = self.folder / name
        (own / "metrics").mkdir(parents=True)
        environment = {
            key: value.replace("/run/fourstep", str(own))
            for key, value in self._environment.items()
        }
        environment |= {
            f"RAY_SERVE_{port}_PORT": str(free_port())
            for port in (
                "HAPROXY_STATS",
                "HAPROXY_METRICS",
                "FALLBACK_PROXY_HTTP",
                "FALLBACK_PROXY_GRPC",
            )
        }
        if worker_port:
            environment["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(worker_port)
        command = [str(BIN / "ray"), "start", *options, "--block", "--disable-usage-stats"]
        command += ["--num-cpus", "6", "--num-gpus", str(self._gpus_per_node)]
        command += ["--node-ip-address", "127.0.0.1", "--object-store-memory", str(100 << 20)]
        for port in ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export"):
            command += [f"--{port}-port", str(free_port())]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

    def deploy(self, config: dict[str, Any]) -> None:
        """`serve deploy`; returns once every application runs with this config."""
        file = self.folder / "serve.json"
        file.write_text(json.dumps(config))
        subprocess.run(
            [BIN / "serve", "deploy", "-a", self._dashboard, file],
            check=True,
            capture_output=True,
            env=self._environment,
        )
        self._wait(lambda: self._settled(config))

    def _settled(self, config: dict[str, Any]) -> bool:
        applications = self.applications()
        for entry in config["applications"]:
            application = applications.get(entry["name"], {})
            assert application.get("status") != "DEPLOY_FAILED", application["message"]
            if application.get("status") != "RUNNING":
                return False
        return True

    def applications(self) -> dict[str, Any]:
        answer = self._client.get(f"{self._dashboard}/api/serve/applications/")
        found: dict[str, Any] = answer.raise_for_status().json()["applications"]
        return found

    def replicas(self, application: str) -> list[dict[str, Any]]:
        """Those that serve, each with its node, process id and state."""
        (deployment,) = self.applications()[application]["deployments"].values()
        return [each for each in deployment["replicas"] if each["state"] == "RUNNING"]

    def wait(self, condition: Any, what: str, within_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"not {what} within {within_s} s"
            time.sleep(0.2)

    def _wait(self, condition: Any) -> None:
        def holds() -> bool:
            for process in self._processes:
                assert process.poll() is None, (self.folder / "head.log").read_text()
            try:
                return bool(condition())
            except httpx.HTTPError:
                return False

        self.wait(holds, "started")

    def close(self) -> None:
        family = [
            child
            for process in self._processes
            for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        ]
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self._processes:
            process.wait()
        self._client.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


@contextlib.contextmanager
def ray_cluster(
    folder: Path, environment: dict[str, str], *, gpus_per_node: int
) -> Iterator[RayCluster]:
    cluster = RayCluster(folder, environment, gpus_per_node=gpus_per_node)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
