"""`fourstep exporter`: the sum over a node's replicas, those that have ended too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.ray_serve.environment import free_port

COUNT = """
from service.telemetry.metrics import Metrics
metrics = Metrics("demo-lcm")
metrics.image(64, 64, 0.01)
metrics.request("generations", 200, 0.5)
"""


def exporter(folder: Path, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "service.cli", "exporter", "--dir", str(folder)]
    return subprocess.Popen(
        [*command, "--port", str(port)], stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
    )


def scrape(process: subprocess.Popen[str], port: int) -> str:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        try:
            return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
        except httpx.HTTPError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_it_adds_up_what_all_replicas_of_the_folder_have_counted(tmp_path: Path) -> None:
    environment = os.environ | {"FOURSTEP_METRICS_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", COUNT], check=True, env=environment)
    port = free_port()
    process = exporter(tmp_path, port)
    try:
        families = {f.name: f for f in text_string_to_metric_families(scrape(process, port))}
        (images,) = families["fourstep_images"].samples
        assert (images.labels, images.value) == ({"model": "demo-lcm"}, 2)
        busy = exporter(tmp_path, port)
        _, complaint = busy.communicate(timeout=60)
        assert busy.returncode == 2
        assert f"--port is {port}: Address already in use" in " ".join(complaint.split())
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    process = exporter(tmp_path / "absent", free_port())
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "it must be a folder that the replicas share" in " ".join(
        complaint.replace("│", " ").split()
    )
