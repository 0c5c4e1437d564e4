"""What /metrics says, after real requests to replicas in processes of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from torch import Tensor

from engines.backends.engine import Engine
from engines.drawing.model import load_model
from engines.drawing.runner import Runner
from engines.order import Order
from service.replica import Replica
from service.settings import Settings, load_settings
from service.telemetry.metrics import Metrics
from service.telemetry.recorder import gpu_memory
from service.web.app import build_app
from tests.replicas import ReplicaProcess, leave_when, replica_process, wait_until_ready
from tests.waiting import wait_for

PATH = "/v1/images/generations"
LONG = {
    "prompt": "x", "n": 4, "size": "128x128", "sampler": "ddim", "num_inference_steps": 1000,
}  # fmt: skip


@pytest.fixture
def node(two_nodes: list[ReplicaProcess]) -> ReplicaProcess:
    return two_nodes[0]


def growth(before: Mapping[str, float], after: Mapping[str, float], series: str) -> float:
    return after[series] - before[series]


def requests_of(status: int, endpoint: str = "generations") -> str:
    return f'fourstep_requests_total{{endpoint="{endpoint}",model="tiny-lcm",status="{status}"}}'


def test_one_request_counts_once_everywhere(node: ReplicaProcess) -> None:
    before = node.metrics()
    body = {"prompt": "counted", "n": 2, "num_inference_steps": 3}
    assert httpx.post(node.url + PATH, json=body, timeout=60).status_code == 200
    after = node.metrics()
    of_model, of_denoise = '{model="tiny-lcm"}', '{model="tiny-lcm",stage="denoise"}'
    for series, expected in {
        requests_of(200): 1,
        f"fourstep_images_total{of_model}": 2,
        f"fourstep_pixels_total{of_model}": 2 * 64 * 64,
        f"fourstep_queue_seconds_count{of_model}": 1,
        f"fourstep_batch_rows_sum{of_denoise}": 2 * 3,
        'fourstep_engine_lanes_total{model="tiny-lcm",stage="denoise",use="row"}': 2 * 3,
        'fourstep_engine_lanes_total{model="tiny-lcm",stage="denoise",use="padding"}': 0,
        'fourstep_request_seconds_count{endpoint="generations",model="tiny-lcm"}': 1,
    }.items():
        assert growth(before, after, series) == expected, series
    busy = growth(before, after, f"fourstep_engine_busy_seconds_total{of_denoise}")
    assert busy > 0
    steps = growth(before, after, f"fourstep_denoise_step_seconds_sum{of_model}")
    assert busy == pytest.approx(steps)


def test_what_is_loaded_stands_there_from_the_start(node: ReplicaProcess) -> None:
    metrics = node.metrics()
    (info,) = [series for series in metrics if series.startswith("fourstep_engine_info{")]
    assert 'backend="onnxruntime"' in info
    assert 'precision="fp32"' in info
    assert 'engine_version="absent"' not in info
    assert metrics[info] == 1
    of_model = '{model="tiny-lcm"}'
    assert metrics[f"fourstep_load_seconds{of_model}"] > 0
    assert f"fourstep_bundle_build_seconds{of_model}" in metrics
    assert metrics[f"fourstep_ready_replicas{of_model}"] == 1
    for status in (429, 499, 500, 503, 504):
        assert requests_of(status, "edits") in metrics, "a first increase would go unseen"


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_client_that_leaves_is_a_499_and_its_rows_are_freed(
    node: ReplicaProcess, stream: bool
) -> None:
    before = node.metrics()
    running = 'fourstep_running_rows{model="tiny-lcm"}'
    body = LONG | ({"stream": True, "partial_images": 1} if stream else {})
    leave_when(node.url + PATH, body, {}, lambda: node.metrics()[running] == 4)
    wait_for(lambda: node.metrics()[running] == 0, "its rows are freed")
    wait_for(lambda: growth(before, node.metrics(), requests_of(499)) == 1, "counted as 499")
    after = node.metrics()
    assert growth(before, after, requests_of(200)) == 0
    assert growth(before, after, 'fourstep_images_total{model="tiny-lcm"}') == 0


def test_a_client_that_leaves_while_it_uploads_is_a_499(node: ReplicaProcess) -> None:
    before = node.metrics()

    def half_a_body() -> Iterator[bytes]:
        yield b"--x\r\n"
        raise ConnectionAbortedError("the user went away")

    headers = {"content-type": "multipart/form-data; boundary=x"}
    with pytest.raises(ConnectionAbortedError):
        httpx.post(f"{node.url}/v1/images/edits", content=half_a_body(), headers=headers)
    wait_for(lambda: growth(before, node.metrics(), requests_of(499, "edits")) == 1, "a 499")
    assert growth(before, node.metrics(), requests_of(500, "edits")) == 0


def test_a_stream_counts_as_what_it_ends_with(node: ReplicaProcess) -> None:
    before = node.metrics()
    preview = 'fourstep_first_preview_seconds_count{model="tiny-lcm"}'
    body = {"prompt": "x", "stream": True, "partial_images": 2, "num_inference_steps": 4}
    assert "completed" in httpx.post(node.url + PATH, json=body, timeout=60).text
    late = httpx.post(
        node.url + PATH,
        json=LONG | {"stream": True},
        headers={"x-request-timeout": "0.3"},
        timeout=60,
    )
    assert late.status_code == 200, "the head had left before the deadline passed"
    assert "deadline_exceeded" in late.text
    after = node.metrics()
    assert growth(before, after, requests_of(200)) == 1
    assert growth(before, after, requests_of(504)) == 1
    assert growth(before, after, preview) == 1, "the first of each request alone"


def test_what_is_shed_is_counted_and_does_not_look_fast(node: ReplicaProcess) -> None:
    before = node.metrics()
    body = {"prompt": "x", "n": 9}  # one more than may wait
    assert httpx.post(node.url + PATH, json=body, timeout=60).status_code == 429
    after = node.metrics()
    assert growth(before, after, requests_of(429)) == 1
    answered = 'fourstep_request_seconds_count{endpoint="generations",model="tiny-lcm"}'
    assert growth(before, after, answered) == 0


def test_a_killed_replica_leaves_its_counts_and_takes_its_gauges(
    node: ReplicaProcess, replica_settings: dict[str, object]
) -> None:
    running, ready, starts = (
        f'fourstep_{name}{{model="tiny-lcm"}}'
        for name in ("running_rows", "ready_replicas", "replica_starts_total")
    )
    before = node.metrics()
    with (
        replica_process(node.folder, **replica_settings) as killed,
        ThreadPoolExecutor(1) as pool,
    ):
        wait_until_ready(killed)
        wait_for(lambda: node.metrics()[ready] == 2, "both are seen at one")
        unanswered = pool.submit(httpx.post, killed.url + PATH, json=LONG, timeout=60)
        wait_for(lambda: node.metrics()[running] == 4, "the rows of the one show at the other")
        killed.process.kill()
        killed.process.wait()
        with pytest.raises(httpx.HTTPError):
            unanswered.result()
    after = node.metrics()
    assert (after[ready], after[running]) == (1, 0)
    assert growth(before, after, starts) == 1


class PaddingEngine:
    """Takes batches of 4 alone, as a plan of one bucket does."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.num_padded_rows = 0

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.num_padded_rows += 4 - len(inputs["sample"])
        return self._engine.run(inputs)

    def weight(self, name: str) -> Tensor:
        return self._engine.weight(name)

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        self._engine.refit(weights)

    def close(self) -> None:
        self._engine.close()


def test_padding_is_counted_as_the_engine_says(lcm_checkpoint: Path, cache_dir: Path) -> None:
    order = Order(str(lcm_checkpoint), "onnxruntime", cache_dir=cache_dir, num_threads=1)
    model = load_model(order, lambda *_: None)
    padding = PaddingEngine(model.engines["denoiser"])
    model = dataclasses.replace(model, engines={**model.engines, "denoiser": padding})
    replica = Replica(load_settings(), lambda _: Runner(model, max_batch=4))
    with TestClient(build_app(replica)) as http:
        body = {"prompt": "x", "n": 3, "num_inference_steps": 2}
        assert http.post(PATH, json=body).status_code == 200
        lines = http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines)
    of_denoise = 'model="tiny-lcm",stage="denoise"'
    num_calls = float(values[f"fourstep_batch_rows_count{{{of_denoise}}}"])
    lanes = f"fourstep_engine_lanes_total{{{of_denoise},use="
    assert float(values[f'{lanes}"row"}}']) == 3 * 2
    padding = float(values[f'{lanes}"padding"}}'])
    assert padding == 4 * num_calls - 3 * 2, "warm-up's padding is not traffic's"


def test_many_who_ask_at_once_are_told_the_same() -> None:
    metrics = Metrics("m", max_age_s=60)
    num_made = 0

    def count() -> None:
        nonlocal num_made
        num_made += 1

    metrics.before_exposition = count
    with ThreadPoolExecutor(16) as pool:
        answers = set(pool.map(lambda _: metrics.exposition(), range(64)))
    assert num_made == 1
    assert len(answers) == 1
    assert b"fourstep_replicas" in answers.pop()[0]


def test_what_was_told_is_told_again_for_a_second_by_default() -> None:
    assert Settings.model_fields["metrics_max_age_s"].default == 1
    metrics = Metrics("m", max_age_s=0.01)
    metrics.ready(True)
    assert b'fourstep_ready_replicas{model="m"} 1.0' in metrics.exposition()[0]
    metrics.ready(False)
    wait_for(
        lambda: b'fourstep_ready_replicas{model="m"} 0.0' in metrics.exposition()[0], "a new one"
    )


def test_no_gpu_no_gpu_memory(node: ReplicaProcess) -> None:
    assert gpu_memory() is None
    assert not [series for series in node.metrics() if series.startswith("fourstep_gpu_memory")]


def test_gpu_memory_is_shown_by_gpu() -> None:
    metrics = Metrics("m")
    metrics.gpu_memory("GPU-7", free_bytes=3 * 2**30, total_bytes=4 * 2**30)
    lines = metrics.exposition()[0].decode().splitlines()
    assert 'fourstep_gpu_memory_bytes{gpu="GPU-7",state="free"} 3.221225472e+09' in lines
    assert 'fourstep_gpu_memory_bytes{gpu="GPU-7",state="used"} 1.073741824e+09' in lines


@pytest.mark.gpu
def test_gpu_memory() -> None:
    import torch

    torch.zeros(1, device="cuda")
    found = gpu_memory()
    assert found is not None
    gpu, free_bytes, total_bytes = found
    assert gpu
    assert 0 < free_bytes < total_bytes
