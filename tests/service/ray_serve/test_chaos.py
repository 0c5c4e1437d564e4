"""Connections closed and processes killed under load, on real Ray Serve: who sees what of it."""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from engines.drawing.model import prepare
from engines.order import Order
from service.ray_serve.environment import REPLAY_BYTES, free_port, haproxy_available
from tests.service.processes import END_TIMEOUT_S, start, wait_until_ready
from tests.service.ray_serve import wedging

CLIENTS = 8
MAX_STEPS = 1000  # many seconds of work: what is cancelled here was not nearly done
WAIT_S = 60.0
BODY = {"prompt": "a red star", "n": 4, "num_inference_steps": 50}  # a second or two of work

pytestmark = pytest.mark.skipif(not haproxy_available(), reason="Ray's HAProxy is for Linux alone")


@dataclass(frozen=True)
class Service:
    """Two replicas behind HAProxy."""

    process: subprocess.Popen[str]
    port: int
    wedge: Path  # where an engine call without end is ordered

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def processes(self, what: str) -> list[psutil.Process]:
        """Its processes by a part of their command line."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if what in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=WAIT_S).text
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        return sum(
            s.value for s in samples if s.name == name and labels.items() <= s.labels.items()
        )

    @property
    def haproxy(self) -> psutil.Process:
        """The HAProxy that takes connections, not one that a reload left to finish its own."""
        return max(
            (child for child in self.processes("haproxy.cfg") if child.name() == "haproxy"),
            key=psutil.Process.create_time,
        )

    def wait_for_replicas(self) -> None:
        """Until HAProxy sends requests to both."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, psutil.Error, ValueError):
                if len(self._replicas_up()) == 2:
                    return
            time.sleep(0.2)
        pytest.fail(f"two replicas are not up within {WAIT_S} s")

    def _replicas_up(self) -> list[str]:
        command = self.haproxy.cmdline()
        config = Path(command[command.index("-f") + 1])
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(config.with_name("admin.sock")))
            connection.sendall(b"show stat\n")
            table = connection.makefile().read().removeprefix("# ").splitlines()
        return [
            row["svname"]
            for row in csv.DictReader(table)
            if row["svname"].startswith("SERVE_REPLICA") and row["status"] == "UP"
        ]


@pytest.fixture(scope="module")
def service(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    prepare(Order(str(lcm_checkpoint), "onnxruntime", "fp32", cache_dir), lambda *_: None)
    port, wedge = free_port(), tmp_path_factory.mktemp("wedge") / "hang"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FOURSTEP_MAX_STEPS", str(MAX_STEPS))
        environment.setenv("FOURSTEP_REQUEST_TIMEOUT_S", "3600")  # else a busy one gives some up
        environment.setenv("FOURSTEP_MAX_CALL_S", "5")  # a call of this model takes milliseconds
        environment.setenv("FOURSTEP_SAFETY", f"{wedging.__name__}:{wedging.Filter.__name__}")
        environment.setenv(wedging.VARIABLE, str(wedge))
        process = start(lcm_checkpoint, cache_dir, port, "--replicas", "2")
    try:
        wait_until_ready(process, port)
        yield Service(process, port, wedge)
    finally:
        process.terminate()
        process.communicate(timeout=END_TIMEOUT_S)


@dataclass
class Load:
    """Closed-loop clients in threads; every answer is kept."""

    ask: Callable[[int], httpx.Response | str]
    answers: list[httpx.Response | str] = field(default_factory=list)
    in_flight: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def _client(self, number: int) -> None:
        while not self._stop.is_set():
            with self._lock:
                self.in_flight += 1
            answer = self.ask(number)
            with self._lock:
                self.in_flight -= 1
                self.answers.append(answer)

    def run(self, breaking: Callable[[], None], *, more: int = CLIENTS) -> int:
        """Break something while every client waits; then ``more`` further answers are awaited.

        Returns the number of requests in flight when it broke.
        """
        threads = [threading.Thread(target=self._client, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            self._wait_for(CLIENTS // 2)
            in_flight = self.in_flight
            breaking()
            self._wait_for(len(self.answers) + in_flight + more)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        return in_flight

    def _wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 2 * WAIT_S
        while len(self.answers) < count:
            assert time.monotonic() < deadline, f"{len(self.answers)} of {count} answers came"
            time.sleep(0.02)


def _generate(service: Service) -> Callable[[int], httpx.Response | str]:
    def ask(number: int) -> httpx.Response | str:
        try:
            url = f"{service.url}/v1/images/generations"
            return httpx.post(url, json=BODY | {"seed": number}, timeout=WAIT_S)
        except httpx.HTTPError as error:
            return repr(error)

    return ask


def _failures(load: Load) -> list[str]:
    return [
        answer if isinstance(answer, str) else f"{answer.status_code} {answer.text[:200]}"
        for answer in load.answers
        if isinstance(answer, str) or answer.status_code != 200
    ]


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "body",
    [{"n": 1}, {"n": 4}, {"n": 2, "stream": True, "partial_images": 3}],
    ids=["one image", "four images", "in mid-stream"],
)
def test_a_client_that_goes_away_frees_its_rows(service: Service, body: dict[str, Any]) -> None:
    service.wait_for_replicas()
    images = service.metric("fourstep_images_total")
    cancelled = service.metric("fourstep_requests_total", status="499")
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT_S)
    long = BODY | body | {"sampler": "ddim", "num_inference_steps": MAX_STEPS, "size": "128x128"}
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/images/generations", json.dumps(long), headers)
    _wait_until(lambda: service.metric("fourstep_running_rows") == body["n"])
    answer = connection.getresponse() if "stream" in body else None
    if answer is not None:
        assert answer.readline() == b"event: image_generation.partial_image\n"
        answer.close()
    connection.close()
    _wait_until(lambda: service.metric("fourstep_running_rows") == 0)
    _wait_until(lambda: service.metric("fourstep_requests_total", status="499") == cancelled + 1)
    assert service.metric("fourstep_waiting_rows") == 0
    assert service.metric("fourstep_images_total") == images, "nothing of it was finished"


def test_a_replica_killed_under_load_costs_no_answer(service: Service) -> None:
    service.wait_for_replicas()
    load = Load(_generate(service))
    in_flight = load.run(service.processes("ServeReplica")[0].kill)
    assert in_flight >= CLIENTS // 2
    assert _failures(load) == []
    pictures = {str(answer.json()["data"]) for answer in load.answers}
    assert len(pictures) <= CLIENTS, "a seed is a seed on every replica"


def test_a_replica_that_hangs_is_replaced_and_costs_no_answer(service: Service) -> None:
    service.wait_for_replicas()
    hung = service.processes("ServeReplica")[0]
    load = Load(_generate(service))
    load.run(hung.suspend)
    assert _failures(load) == []
    assert not hung.is_running(), "what it had in hand was drawn by another"


def test_a_replica_whose_engine_hangs_is_replaced_and_costs_no_answer(service: Service) -> None:
    """It answers all the while, so Ray goes by what the replica says of its engine."""
    service.wait_for_replicas()
    replicas = service.processes("ServeReplica")
    load = Load(_generate(service))

    def hang() -> None:
        service.wedge.touch()
        _wait_until(lambda: not all(replica.is_running() for replica in replicas))

    load.run(hang)
    assert not service.wedge.exists()
    assert sum(replica.is_running() for replica in replicas) == 1
    assert _failures(load) == []


def test_the_controller_killed_under_load_costs_no_answer(service: Service) -> None:
    service.wait_for_replicas()
    load = Load(_generate(service))
    (controller,) = service.processes("ServeController")
    load.run(controller.kill)
    assert _failures(load) == []


def test_what_cannot_be_sent_again_fails_cleanly(service: Service) -> None:
    service.wait_for_replicas()
    pixels = np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")  # noise: as large as it is raw
    assert len(buffer.getvalue()) > REPLAY_BYTES
    fields = {key: str(value) for key, value in BODY.items()} | {"strength": "1"}

    def ask(number: int) -> httpx.Response | str:
        try:
            return httpx.post(
                f"{service.url}/v1/images/edits",
                data=fields | {"size": "64x64", "seed": str(number)},
                files={"image": ("image.png", buffer.getvalue(), "image/png")},
                timeout=WAIT_S,
            )
        except httpx.HTTPError as error:
            return repr(error)

    load = Load(ask)
    load.run(service.processes("ServeReplica")[0].kill)
    lost = [answer for answer in load.answers if _failures(Load(ask, [answer]))]
    assert lost, "the replica that was killed had requests of its own"
    for answer in lost:
        if isinstance(answer, str):  # HAProxy had sent it over a connection that was used before:
            assert "disconnected without sending" in answer  # HTTP lets a client try again then
            continue
        assert answer.status_code in (502, 503), answer.text
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] in ("replica_lost", "not_ready")


def test_haproxy_killed_under_load_comes_back_and_the_client_tries_again(service: Service) -> None:
    service.wait_for_replicas()
    client = openai.OpenAI(api_key="none", base_url=f"{service.url}/v1", max_retries=10)

    def ask(number: int) -> httpx.Response | str:
        try:
            answer = client.images.with_raw_response.generate(
                prompt="a red star", n=4, extra_body={"num_inference_steps": 50, "seed": number}
            )
            return answer.http_response
        except openai.OpenAIError as error:
            return repr(error)

    load = Load(ask)
    load.run(service.haproxy.kill)
    assert _failures(load) == []
