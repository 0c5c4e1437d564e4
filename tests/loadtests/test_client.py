"""The client: what it sends where, and that a slow server cannot hide its queue from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import typer

from loadtests.client import (
    MAX_REQUESTS,
    Client,
    Latencies,
    check_url,
    require_answers,
    summarise,
)
from loadtests.traffic import UNIFORM

SERVICE_S = 0.05


class _OneAtATime(BaseHTTPRequestHandler):
    """Takes 50 ms for each request; every third is refused."""

    num_served = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(SERVICE_S)
        cls = type(self)
        cls.num_served += 1
        refused = self.path == "/refusing" and cls.num_served % 3 == 0
        self.send_response(503 if refused else 200)
        self.send_header("server-timing", "queue;dur=1.5, total;dur=50.25")
        self.send_header("content-length", "4")
        self.end_headers()
        self.wfile.write(b"done")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def slow_url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _OneAtATime)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_percentiles_are_those_of_the_values() -> None:
    values = np.random.default_rng(1).lognormal(-2, 1, 5000)
    found = Latencies(values)
    for percent in (50, 95, 99):
        exact = 1e3 * np.percentile(values, percent, method="inverted_cdf")
        assert found.ms(percent) == pytest.approx(exact, rel=2e-3)
    assert np.isnan(Latencies([]).ms(50))


def test_latency_counts_from_when_a_request_was_due(slow_url: str) -> None:
    """Ten requests due at once at a server for one: the last has waited for all the others."""
    answers = Client(slow_url).open_loop(UNIFORM.asks(10, seed=1), [0.0] * 10)
    require_answers(answers, "the server")
    assert sorted(answer.latency_s for answer in answers)[-1] >= 10 * SERVICE_S
    assert summarise(answers)["num_requests"] == 10
    assert answers[0].timings == {"queue": 1.5, "total": 50.25}
    assert answers[0].num_bytes == 4


def test_a_closed_loop_never_has_more_open_than_clients(slow_url: str) -> None:
    answers = Client(slow_url).closed_loop(UNIFORM.asks(6, seed=1), num_clients=1)
    ends = sorted(answer.done_s for answer in answers)
    begins = sorted(answer.sent_s for answer in answers)
    assert all(begin >= end for begin, end in zip(begins[1:], ends, strict=False))


def test_errors_are_counted_and_can_be_refused(slow_url: str) -> None:
    answers = Client(slow_url, "/refusing").closed_loop(UNIFORM.asks(6, seed=1), num_clients=1)
    assert summarise(answers)["error_share"] == pytest.approx(2 / 6, abs=1e-4)
    with pytest.raises(RuntimeError, match=r"2 of 6 requests failed, with status \[503\]"):
        require_answers(answers, "the server")


def test_a_server_that_is_gone_is_an_error_not_an_exception() -> None:
    (answer,) = Client("http://127.0.0.1:1").closed_loop(UNIFORM.asks(1, seed=1), num_clients=1)
    assert (answer.status, answer.ok) == (0, False)


def test_load_goes_only_where_it_was_sent() -> None:
    assert check_url("http://127.0.0.1:8000/") == "http://127.0.0.1:8000"
    assert check_url("http://gpu.example", ["gpu.example"]) == "http://gpu.example"
    with pytest.raises(typer.BadParameter, match=r"--allow-host gpu\.example"):
        check_url("http://gpu.example")
    asks = UNIFORM.asks(1, seed=1) * (MAX_REQUESTS + 1)
    with pytest.raises(typer.BadParameter, match=f"at most {MAX_REQUESTS}"):
        Client("http://127.0.0.1:1").open_loop(asks, [0.0] * len(asks))
