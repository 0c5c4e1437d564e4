"""Locust scenarios: product mix, burst, ramp, soak, streaming, image-to-image.

    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 --scenario burst       # web view
    locust -f loadtests/locustfile.py --headless --scenario mix --arrivals 10 --max-p95-ms 800

Users wait for their answers (closed loop), unless ``--arrivals`` has requests leave at Poisson
times whatever the answers do (open loop). Each scenario ends by itself; a broken threshold is exit
code 1.
"""

from __future__ import annotations

import io
import json
import logging
import random
import time
import urllib.parse
from argparse import ArgumentParser
from typing import Any

import gevent
from locust import HttpUser, LoadTestShape, events, task
from locust.env import Environment
from locust.exception import StopUser
from PIL import Image
from urllib3 import PoolManager

from loadtests.traffic import MIXED, Ask
from service.ray_serve.machine import is_loopback

SCENARIOS = ("mix", "burst", "ramp", "soak", "stream", "edit")
FORMATS = ("png", "webp", "jpeg")
NUM_IMAGES = (1, 1, 1, 2, 4)  # `n`, drawn with equal weight
SIDES = (0.75, 1.0)  # of the model's own
NUM_BURSTS = 3  # of a burst run: each a third of its time, two fifths of that at full load
logger = logging.getLogger("loadtests")


@events.init_command_line_parser.add_listener
def _options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("Fourstep")
    group.add_argument("--scenario", choices=SCENARIOS, default="mix")
    group.add_argument(
        "--arrivals", type=float, default=0.0, help="requests/s of an open loop; 0: closed loop"
    )
    group.add_argument("--seconds", type=float, default=60.0, help="after which the test ends")
    group.add_argument("--max-requests", type=int, default=20_000, help="after which it ends too")
    group.add_argument(
        "--allow-host", action="append", default=[], help="a host other than this machine"
    )
    group.add_argument("--max-p95-ms", type=float, default=0.0, help="0: no threshold")
    group.add_argument("--max-error-share", type=float, default=0.001)


@events.test_start.add_listener
def _check_host(environment: Environment, **_: Any) -> None:
    allowed = environment.parsed_options.allow_host
    host = urllib.parse.urlsplit(environment.host or "").hostname
    if host is None or not (is_loopback(host) or host in allowed):
        logger.error(
            "--host is %s; load goes to this machine only, or to a host named with --allow-host",
            environment.host,
        )
        environment.process_exit_code = 2
        environment.runner.quit()


@events.quitting.add_listener
def _judge(environment: Environment, **_: Any) -> None:
    """Exit code 1 where a threshold is broken, or where nothing was measured."""
    options, total = environment.parsed_options, environment.stats.total
    p95 = total.get_response_time_percentile(0.95) or 0
    broken = []
    if total.num_requests == 0:
        broken.append("no request was answered")
    if total.fail_ratio > options.max_error_share:
        broken.append(f"{total.fail_ratio:.2%} errors, allowed {options.max_error_share:.2%}")
    if options.max_p95_ms and p95 > options.max_p95_ms:
        broken.append(f"p95 {p95:.0f} ms, allowed {options.max_p95_ms:.0f} ms")
    for line in broken:
        logger.error("threshold: %s", line)
    if broken and not environment.process_exit_code:
        environment.process_exit_code = 1


class Shape(LoadTestShape):
    """How many users there are, over the time of the scenario."""

    use_common_options = True  # --users and --spawn-rate keep their meaning: the full load

    def tick(self) -> tuple[int, float] | None:
        options, stats = self.runner.environment.parsed_options, self.runner.stats.total
        elapsed = self.get_run_time() / options.seconds
        if elapsed >= 1 or stats.num_requests >= options.max_requests:
            return None
        users, spawn_rate = options.num_users or 1, options.spawn_rate or 1
        if options.scenario == "burst":
            at_full_load = (elapsed * NUM_BURSTS) % 1 < 0.4
            users, spawn_rate = (users if at_full_load else max(1, users // 10)), users
        elif options.scenario == "ramp":
            users = max(1, round(users * elapsed))
        return users, max(spawn_rate, 1)


class Customer(HttpUser):
    """One user of the API, doing what the scenario says."""

    host = "http://127.0.0.1:8000"
    pool_manager = PoolManager(maxsize=256)

    def on_start(self) -> None:
        self._options = self.environment.parsed_options
        self._random = random.Random(id(self))
        request = {"stream": self._stream, "edit": self._edit}
        self._request = request.get(self._options.scenario, self._generate)
        self._image = _png() if self._options.scenario == "edit" else b""
        self._due = time.monotonic()
        details = self.client.get("/v1/models").json()["data"][0]["details"]
        own, multiple = int(details["default_size"].split("x")[0]), details["size_multiple_px"]
        self._sides_px = [round(own * side / multiple) * multiple for side in SIDES]

    @task
    def ask(self) -> None:
        """One request, or in the open loop the next one when it is due."""
        if not self._options.arrivals:
            self._request()
            return
        num_users = max(1, self.environment.runner.user_count)
        self._due += self._random.expovariate(self._options.arrivals / num_users)
        gevent.sleep(max(0.0, self._due - time.monotonic()))
        if self.environment.runner.stats.total.num_requests >= self._options.max_requests:
            raise StopUser
        gevent.spawn(self._request)

    def _body(self) -> dict[str, Any]:
        rng = self._random
        side = rng.choice(self._sides_px)
        ask: Ask = MIXED.asks(1, rng.randrange(2**32))[0]
        return ask.body() | {"size": f"{side}x{side}", "seed": rng.randrange(2**32)}

    def _generate(self) -> None:
        count, kind = self._random.choice(NUM_IMAGES), self._random.choice(FORMATS)
        body = self._body() | {"n": count, "output_format": kind}
        with self.client.post(
            "/v1/images/generations", json=body, name=f"generate n={count}", catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(_reason(answer))
            elif len(answer.json()["data"]) != count:
                answer.failure(f"{len(answer.json()['data'])} images instead of {count}")

    def _stream(self) -> None:
        body = self._body() | {"stream": True, "partial_images": 2}
        begun, first_ms, done = time.perf_counter(), None, False
        with self.client.post(
            "/v1/images/generations", json=body, name="stream", stream=True, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(_reason(answer))
                return
            for line in answer.iter_lines():
                if line.startswith(b"event: image_generation.") and first_ms is None:
                    first_ms = 1e3 * (time.perf_counter() - begun)
                done |= line == b"event: image_generation.completed"
            if not done:
                answer.failure("the stream ended without a completed image")
        if first_ms is not None:
            self.environment.events.request.fire(
                request_type="SSE", name="stream, first event", response_time=first_ms,
                response_length=0, exception=None, context={},
            )  # fmt: skip

    def _edit(self) -> None:
        body = self._body()
        fields = {"prompt": body["prompt"], "strength": "0.6", "size": body["size"]}
        with self.client.post(
            "/v1/images/edits", data=fields, files={"image": ("in.png", self._image, "image/png")},
            name="edit", catch_response=True,
        ) as answer:  # fmt: skip
            if answer.status_code != 200:
                answer.failure(_reason(answer))


def _png() -> bytes:
    """An input image; what is in it makes no difference to the load."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _reason(answer: Any) -> str:
    try:
        return f"{answer.status_code}: {answer.json()['error']['message']}"
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"{answer.status_code}: {answer.text[:200]}"
