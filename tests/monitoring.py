"""A real Prometheus with our rules, traffic for it to see, and the metrics that a query names."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.ray_serve.environment import free_port
from tests.replicas import ReplicaProcess
from tests.waiting import wait_for

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
SCRAPE_S = 1
WAY_OUT = "the Debian package `prometheus` has prometheus and promtool"
PATH = "/v1/images/generations"
# Ours have our name; a colon marks what a rule has recorded.
NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*fourstep[a-zA-Z0-9_:]*|fourstep[a-zA-Z0-9_:]*")


def program(name: str) -> str:
    """Where it is, or a skip that says how to get it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: {WAY_OUT}")
    return found


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads; text in quotes is none."""
    return set(NAME.findall(re.sub(r'"[^"]*"', '""', expression)))


@dataclass(frozen=True)
class Prometheus:
    """Its HTTP API."""

    url: str

    def get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30).json()
        assert answer["status"] == "success", (params, answer)
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def names(self) -> set[str]:
        """Every metric it has."""
        return set(self.get("label/__name__/values"))


@contextlib.contextmanager
def run_prometheus(folder: Path, targets: list[str]) -> Iterator[Prometheus]:
    """Runs the example configuration over these targets, quicker."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [program("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={address}", "--log.level=warn"]
    process = subprocess.Popen(command)
    prometheus = Prometheus(f"http://{address}")
    try:
        wait_for(lambda: _is_up(prometheus, process), "Prometheus is up")
        yield prometheus
    finally:
        process.terminate()
        process.wait()


def _is_up(prometheus: Prometheus, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "Prometheus ended; its reason is above"
    try:
        return httpx.get(f"{prometheus.url}/-/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def send_traffic(node: ReplicaProcess) -> None:
    """Images, previews, an edit, a refusal and a missed deadline."""
    for body, headers, status in (
        ({"num_inference_steps": 2, "n": 2}, {}, 200),
        ({"stream": True, "partial_images": 1}, {}, 200),
        ({"n": 9}, {}, 429),
        ({"num_inference_steps": 1000, "sampler": "ddim"}, {"x-request-timeout": "0.05"}, 504),
    ):
        request = {"prompt": "x", **body}
        answer = httpx.post(node.url + PATH, json=request, headers=headers, timeout=60)
        assert answer.status_code == status, answer.text
    png = {"accept": "image/png"}
    image = httpx.post(node.url + PATH, json={"prompt": "x"}, headers=png, timeout=60)
    files = {"image": ("x.png", image.content)}
    edit = httpx.post(f"{node.url}/v1/images/edits", data={"prompt": "x"}, files=files, timeout=60)
    assert edit.status_code == 200, edit.text
