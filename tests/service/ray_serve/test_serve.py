"""`fourstep serve` as a user runs it: real Ray Serve, real HAProxy, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from engines.drawing.model import prepare
from engines.order import Order
from service.ray_serve.environment import free_port
from service.settings import SettingsError, load_settings
from tests.engines.checkpoints import make_tiny_vae
from tests.service.processes import END_TIMEOUT_S, start, wait_until_ready
from tests.waiting import wait_for


@pytest.fixture
def server(
    lcm_checkpoint: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    monkeypatch.setenv("FOURSTEP_METRICS_MAX_AGE_S", "0")  # `wait_until_running` reads them
    monkeypatch.setenv("FOURSTEP_MAX_STEPS", str(NUM_STEPS))
    # A busy machine would call what is in hand hopeless, or cut it.
    monkeypatch.setenv("FOURSTEP_REQUEST_TIMEOUT_S", "3600")
    monkeypatch.setenv("FOURSTEP_DRAIN_S", "120")
    port = free_port()
    process = start(lcm_checkpoint, cache_dir, port, own_session=True)
    yield process, port
    for left in [process, *session(process)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.communicate()


def session(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """What it has started, whoever has died since, and itself."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(each.pid) == process.pid and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def haproxy_config(process: subprocess.Popen[str]) -> str:
    """Of the one that was started last."""
    found = ""
    for each in session(process):
        with contextlib.suppress(psutil.NoSuchProcess, StopIteration):
            if each.name() == "haproxy":
                file = Path(next(part for part in each.cmdline() if part.endswith(".cfg")))
                found = file.read_text()
    return found


def wait_until_direct(process: subprocess.Popen[str]) -> None:
    """HAProxy asks the replica itself: what Ray's proxy brings dies with Ray."""
    wait_for(lambda: "server SERVE_REPLICA" in haproxy_config(process), "HAProxy knows the replica")


def assert_nothing_is_left(process: subprocess.Popen[str], port: int) -> None:
    _, alive = psutil.wait_procs(session(process), timeout=60)
    assert alive == []
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


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
    for name in ("x-request-id", "serve-multiplexed-model-id", "x-session-id"):  # Ray reads them
        odd = httpx.get(f"{base}/v1/models", headers=[(name, b"\xff")])
        assert (odd.status_code, odd.headers["x-frame-options"]) == (200, "DENY"), name
        assert odd.headers["x-request-id"].startswith("req_")
    hasty = {"x-request-timeout-seconds": "0.000001"}  # Ray's own, which is not offered
    assert httpx.get(f"{base}/v1/models", headers=hasty).status_code == 200
    events = list(client.images.generate(prompt="x", stream=True, partial_images=1))
    assert events[-1].type == "image_generation.completed"
    metrics = httpx.get(f"{base}/metrics", timeout=60).text
    assert 'fourstep_images_total{model="tiny-lcm"} 4.0' in metrics
    assert "autoscaler" not in metrics, "Ray's own processes must not write into our metrics"
    config = haproxy_config(process)
    sizes = dict(re.findall(r"^ *tune\.(bufsize|memory\.hot-size) (\d+)$", config, re.MULTILINE))
    assert int(sizes["memory.hot-size"]) >= 8 * int(sizes["bufsize"]), "else pages come anew"
    assert "http-request set-header x-request-disconnect-disabled ?1" in config
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 0, output
    entries = [json.loads(line) for line in output.splitlines() if line.startswith('{"time": ')]
    (entry,) = [entry for entry in entries if entry["request_id"] == "given"]
    assert entry["path"] == "/v1/images/generations"
    assert entry["status"] == 200
    assert entry["denoise_ms"] > 0
    assert_nothing_is_left(process, port)


OUR_WORDS = re.compile(
    r"\[\d/\d\] |Starting Ray Serve|Serving |  (studio|API|metrics) |  curl |       -d |"
    r"Ctrl-C stops|Finishing what runs|$"
)


def test_a_terminal_shows_our_words_alone(
    lcm_checkpoint: Path, fresh_cache: Path, tmp_path: Path
) -> None:
    port, tiny_vae = free_port(), make_tiny_vae(tmp_path / "vae")
    # A bundle is built first, of what libraries have doubts about.
    process = start(lcm_checkpoint, fresh_cache, port, "--tiny-vae", tiny_vae)
    try:
        wait_until_ready(process, port)
        httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"x-request-id": "given"})
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=END_TIMEOUT_S)
    finally:
        process.kill()
        process.communicate()
    log, words = [], []
    for line in output.splitlines():
        (log if line.startswith("{") else words).append(line)
    assert [line for line in words if not OUR_WORDS.match(line)] == []
    assert "given" in [json.loads(line)["request_id"] for line in log]


NUM_IMAGES, NUM_STEPS = 8, 120  # of a request: six of them are in hand while someone looks


def draw(base: str, seed: int) -> int:
    """The status of an answer that takes some seconds of work, in all."""
    body = {"prompt": "a red star", "n": NUM_IMAGES, "num_inference_steps": NUM_STEPS, "seed": seed,
            "sampler": "ddim"}  # fmt: skip  # LCM's has no more than 50 steps
    return httpx.post(f"{base}/v1/images/generations", json=body, timeout=600).status_code


def wait_until_running(base: str, answers: list[Future[int]]) -> None:
    """All requests must have come in, not all be finished, when something is broken."""
    done = 0
    while done < len(answers):
        done = sum(answer.done() for answer in answers)  # before the others are counted
        metrics = httpx.get(f"{base}/metrics", timeout=60).text
        found = re.findall(r"^fourstep_(?:running|waiting)_rows.* (\S+)$", metrics, re.M)
        if sum(map(float, found)) > NUM_IMAGES * (len(answers) - done - 1):
            return
    pytest.fail(f"none was left in hand: {[answer.result() for answer in answers]}")


@contextlib.contextmanager
def six_in_hand(port: int) -> Iterator[None]:
    """Six requests have come in when this is entered; whatever is done inside, all are answered."""
    base = f"http://127.0.0.1:{port}"
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(draw, base, seed) for seed in range(6)]
        wait_until_running(base, answers)
        yield
        assert [answer.result() for answer in answers] == [200] * 6


LATE_AGENTS = """
import sys, time
from pathlib import Path

for agent in ("dashboard/agent.py", "runtime_env/agent/main.py"):
    if any(word.endswith(agent) for word in sys.orig_argv):
        Path(__file__).with_name(agent.replace("/", "-")).touch()
        time.sleep(3600)
"""


@pytest.fixture
def late_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As on a busy machine, but later: Ray's agents do not come up. The folder names each."""
    folder = tmp_path / "late"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(LATE_AGENTS)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return folder


def test_though_rays_agents_are_late_it_serves_and_sigterm_finishes_what_was_accepted(
    late_agents: Path, server: tuple[subprocess.Popen[str], int]
) -> None:
    process, port = server
    wait_until_ready(process, port)
    assert len(list(late_agents.glob("*agent*"))) == 2
    with six_in_hand(port):
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 0, output


def test_sigterm_to_the_whole_group_finishes_what_was_accepted_and_leaves_nothing(
    server: tuple[subprocess.Popen[str], int],
) -> None:
    """Ray's raylet would kill the replicas, if it got it too."""
    process, port = server
    wait_until_ready(process, port)
    with contextlib.suppress(ProcessLookupError):  # of one that has just ended
        groups = {each.pid: os.getpgid(each.pid) for each in session(process)}
        assert [pid for pid, group in groups.items() if group == process.pid] == [process.pid]
    with six_in_hand(port):
        os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 0, output
    assert_nothing_is_left(process, port)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("raylet", signal.SIGKILL),
        ("gcs_server", signal.SIGKILL),
        ("gcs_server", signal.SIGTERM),  # it serves no more, but its process stays
    ],
)
def test_without_ray_itself_it_ends_and_leaves_nothing(
    server: tuple[subprocess.Popen[str], int], name: str, number: int
) -> None:
    """Ray would replace nothing any more: what had come in is drawn, then a supervisor's turn."""
    process, port = server
    wait_until_ready(process, port)
    wait_until_direct(process)
    with six_in_hand(port):
        (lost,) = [each for each in session(process) if each.name() == name]
        lost.send_signal(number)
    output, _ = process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 1
    assert re.search(r"^error: Ray's \w+ is gone ", output, re.M), output
    assert_nothing_is_left(process, port)


def test_a_busy_port_is_one_clear_line(lcm_checkpoint: Path, cache_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(lcm_checkpoint, cache_dir, port)
        output, _ = process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 1
    assert output.strip() == (
        f"error: port {port} on 127.0.0.1 cannot be used (Address already in use); "
        "choose one with --port"
    )


def test_a_config_file_serves_several_applications_and_replicas(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path: Path
) -> None:
    port, config = free_port(), tmp_path / "serve.yaml"
    applications = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "service.ray_serve.deployment:build",
            "args": {
                "model": str(lcm_checkpoint),
                "model_id": name,
                "num_replicas": num_replicas,
                "cache_dir": str(cache_dir),
            },
        }
        for name, num_replicas in (("sketch", 2), ("poster", 1))
    ]
    config.write_text(json.dumps({"applications": applications}))  # JSON is YAML
    process = start(lcm_checkpoint, cache_dir, port, "--config", config)
    try:
        wait_until_ready(process, port, "/sketch")
        wait_until_ready(process, port, "/poster")
        for name in ("sketch", "poster"):
            base_url = f"http://127.0.0.1:{port}/{name}/v1"
            client = openai.OpenAI(api_key="none", base_url=base_url, max_retries=0)
            assert [model.id for model in client.models.list()] == [name]
            assert client.images.generate(prompt="a red star").data
        base_url = f"http://127.0.0.1:{port}/sketch/v1"
        client = openai.OpenAI(api_key="none", base_url=base_url, max_retries=0)
        for _ in range(4):  # whichever replica draws, whichever is asked
            (item,) = client.images.generate(prompt="x", response_format="url").data or []
            assert str(item.url).startswith(f"{base_url}/images/files/")
            answers = [httpx.get(str(item.url)) for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200] * 4
        replicas = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if " ".join(child.cmdline()).startswith("ray::ServeReplica:")
        ]
        assert len(replicas) == 3, [child.cmdline() for child in replicas]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=END_TIMEOUT_S)
        assert process.returncode == 0, output
    finally:
        process.kill()
        process.communicate()


def test_a_damaged_bundle_is_one_clear_line(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path: Path
) -> None:
    bundle = prepare(Order(str(lcm_checkpoint), "onnxruntime", "fp32", cache_dir), lambda *_: None)
    damaged = shutil.copytree(bundle.folder, tmp_path / "damaged")
    graph = next(damaged.glob("denoiser*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1])
    process = start(damaged, cache_dir, free_port())
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.startswith("error: ")
    assert graph.name in output
    assert output.count("\n") == 1


def test_a_model_that_fails_in_the_replica_is_one_clear_line(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(lcm_checkpoint, tmp_path / "broken")
    (broken / "unet" / "config.json").write_text("{}")
    process = start(broken, cache_dir, free_port(), "--engine", "torch")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "application 'fourstep' cannot start" in line
    assert str(broken) in line


def test_unknown_settings_name_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="did you mean 'max_batch'"):
        load_settings({"max_bach": 4})
    with pytest.raises(SettingsError, match=r"'png_level'.*less than or equal to 9.*got 12"):
        load_settings({"png_level": 12})
    monkeypatch.setenv("FOURSTEP_PNG_LEVLE", "3")
    with pytest.raises(SettingsError, match="png_level"):
        load_settings()
