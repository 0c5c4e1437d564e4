"""A Ray cluster of two nodes on this machine, as KubeRay starts one: `ray start`, `serve deploy`.

Every node has the environment of the manifests, with folders and ports of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from service.ray_serve.environment import free_port
from service.ray_serve.haproxy import PROBES_AT
from tests.deploy.container import PATIENCE

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
DEADLINE_S = 900  # a machine that others use
OWN_PORTS = ("HAPROXY_STATS", "HAPROXY_METRICS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC")


class RayCluster:
    """A head and a worker node, which `close` ends with all their processes.

    Ray's token, as KubeRay makes one for `authOptions: {mode: token}`, guards both.
    """

    def __init__(self, folder: Path, environment: dict[str, str], *, gpus_per_node: int) -> None:
        self.folder = folder
        self.ports = {"head": free_port(), "worker": free_port()}  # of the proxies
        self.agent_ports = {"head": free_port(), "worker": free_port()}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment | token | PATIENCE
        # Ray believes in GPUs that it is told of, but not against a list without any (conftest).
        self._environment.pop("CUDA_VISIBLE_DEVICES", None)
        self._gpus_per_node = gpus_per_node
        self._gcs_port, self._dashboard_port = str(free_port()), str(free_port())
        self._dashboard = f"http://127.0.0.1:{self._dashboard_port}"
        headers = {"Authorization": f"Bearer {token['RAY_AUTH_TOKEN']}"}
        self._client = httpx.Client(headers=headers, timeout=120)
        self._temporary = tempfile.mkdtemp(prefix="fs")  # short: sockets lie in it
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        head = ["--head", "--port", self._gcs_port, "--temp-dir", self._temporary]
        head += ["--dashboard-port", self._dashboard_port]
        self._start("head", [*head, "--ray-client-server-port", str(free_port())])
        self.wait(lambda: self.applications() == {}, "a dashboard that answers")
        self.start_worker()

    def start_worker(self) -> None:
        """Start the second node, where it is not there."""
        if "worker" in self._processes:
            return
        self._start("worker", ["--address", f"127.0.0.1:{self._gcs_port}"])
        self.wait(lambda: self._num_nodes() == 2, "two nodes")

    def _start(self, name: str, options: list[str]) -> None:
        own = Path(self._temporary) / name
        (own / "metrics").mkdir(parents=True, exist_ok=True)
        environment = {
            key: value.replace("/run/fourstep", str(own))
            for key, value in self._environment.items()
        }
        environment |= {f"RAY_SERVE_{port}_PORT": str(free_port()) for port in OWN_PORTS}
        environment[PROBES_AT] = f"127.0.0.1:{free_port()}"
        environment["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(self.ports["worker"])
        command = [str(BIN / "ray"), "start", *options, "--block", "--disable-usage-stats"]
        command += ["--num-cpus", "8", "--num-gpus", str(self._gpus_per_node)]
        command += ["--node-ip-address", "127.0.0.1", "--object-store-memory", str(100 << 20)]
        command += ["--dashboard-agent-listen-port", str(self.agent_ports[name])]
        for port in ("dashboard-agent-grpc", "metrics-export"):
            command += [f"--{port}-port", str(free_port())]
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log
            )

    def deploy(self, config: dict[str, Any]) -> None:
        """`serve deploy`; returns once every application runs with this config."""
        file = self.folder / "serve.json"
        file.write_text(json.dumps(config))
        done = subprocess.run(
            [BIN / "serve", "deploy", "-a", self._dashboard, file],
            capture_output=True, text=True, env=self._environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.wait(lambda: self._runs(config), "every application running")

    def _runs(self, config: dict[str, Any]) -> bool:
        applications = self.applications()
        for entry in config["applications"]:
            application = applications.get(entry["name"], {})
            assert application.get("status") != "DEPLOY_FAILED", application
            if application.get("status") != "RUNNING":
                return False
        return True

    def applications(self) -> dict[str, Any]:
        """As the dashboard tells KubeRay of them."""
        answer = self._client.get(f"{self._dashboard}/api/serve/applications/")
        found: dict[str, Any] = answer.raise_for_status().json()["applications"]
        return found

    def _num_nodes(self) -> int:
        answer = self._client.get(f"{self._dashboard}/nodes", params={"view": "summary"})
        nodes = answer.raise_for_status().json()["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def replicas(self, application: str = "fourstep", state: str = "RUNNING") -> dict[str, str]:
        """Id → node of the replicas in a state; ``state`` empty: of all that have a node."""
        (deployment,) = self.applications()[application]["deployments"].values()
        return {
            each["replica_id"]: each["node_id"]
            for each in deployment["replicas"]
            if state in ("", each["state"]) and each.get("node_id")
        }

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Until the condition holds, as long as the nodes live and the deadline is not over."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if condition():
                    return
            for name, process in self._processes.items():
                assert process.poll() is None, self.log(name)
            assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
            time.sleep(0.2)

    def log(self, name: str) -> str:
        """What a node has written to its output: a pod's log."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def end_node(self, name: str) -> None:
        """Send SIGTERM, as Kubernetes does to a pod that must go, and wait until it is gone."""
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        self.wait(lambda: process.poll() is not None, f"the end of {name}")

    def kill_node(self, name: str) -> None:
        """SIGKILL to all its processes at once, as when a machine loses power."""
        process = self._processes.pop(name)
        node = psutil.Process(process.pid)
        for each in (node, *node.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()

    def _owns(self, process: psutil.Process) -> bool:
        return any(word.startswith(self._temporary) for word in process.info["cmdline"] or ())

    def close(self) -> None:
        family = []
        for process in self._processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself: see its log
                node = psutil.Process(process.pid)
                family += [node, *node.children(recursive=True)]
        for process in reversed(self._processes.values()):
            process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=5)
        # An HAProxy that was started anew meanwhile: it names a file in our folder.
        alive += [each for each in psutil.process_iter(["cmdline"]) if self._owns(each)]
        for survivor in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
        for process in self._processes.values():
            process.wait()
        self._client.close()
        shutil.rmtree(self._temporary, ignore_errors=True)
