"""`fourstep serve` as a user runs it: real Ray Serve, real HAProxy, Ctrl-C."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from service.settings import SettingsError, load_settings

START_TIMEOUT_S = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(model: Path, cache_dir: Path, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "service.cli", "serve", "--model", str(model)]
    command += ["--port", str(port), "--cache-dir", str(cache_dir)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path.cwd()
    )


@pytest.fixture
def server(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    process = start(lcm_checkpoint, cache_dir, port)
    yield process, port
    if process.poll() is None:
        process.kill()
    process.communicate()


def wait_until_ready(process: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    pytest.fail(f"not ready within {START_TIMEOUT_S} s")


def test_serves_through_haproxy_and_ctrl_c_ends_everything(
    server: tuple[subprocess.Popen[str], int],
) -> None:
    process, port = server
    wait_until_ready(process, port)
    base = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(api_key="none", base_url=f"{base}/v1", max_retries=0)
    answer = client.images.generate(prompt="a red star", n=2)
    assert answer.data is not None
    assert len(answer.data) == 2
    raw = httpx.post(
        f"{base}/v1/images/generations",
        json={"prompt": "x"},
        headers={"accept": "image/webp", "x-request-id": "given"},
    )
    assert raw.headers.get_list("x-request-id") == ["given"]
    assert raw.headers["content-type"] == "image/webp"
    events = list(client.images.generate(prompt="x", stream=True, partial_images=1))
    assert events[-1].type == "image_generation.completed"
    metrics = httpx.get(f"{base}/metrics").text
    assert 'fourstep_images_total{model="tiny-lcm"} 4.0' in metrics
    assert "autoscaler" not in metrics, "Ray's own processes must not write into our metrics"
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("haproxy" in child.name() for child in children)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    lines = [line[line.index("{") :] for line in output.splitlines() if '"logger": ' in line]
    entries = [json.loads(line.removesuffix("\x1b[0m")) for line in lines]
    (entry,) = [entry for entry in entries if entry["request_id"] == "given"]
    assert entry["path"] == "/v1/images/generations"
    assert entry["status"] == 200
    assert entry["denoise_ms"] > 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_a_busy_port_is_one_clear_line(lcm_checkpoint: Path, cache_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(lcm_checkpoint, cache_dir, port)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.strip() == (
        f"error: port {port} on 127.0.0.1 cannot be used (Address already in use); "
        "choose one with --port"
    )


def test_unknown_settings_name_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="did you mean 'max_batch'"):
        load_settings({"max_bach": 4})
    with pytest.raises(SettingsError, match=r"'png_level'.*less than or equal to 9.*got 12"):
        load_settings({"png_level": 12})
    monkeypatch.setenv("FOURSTEP_PNG_LEVLE", "3")
    with pytest.raises(SettingsError, match="png_level"):
        load_settings()
