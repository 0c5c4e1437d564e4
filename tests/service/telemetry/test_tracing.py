"""Traces as a collector receives them, and logs beside them."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.replica import Replica
from service.settings import SettingsError, load_settings
from service.telemetry.tracing import Tracing
from service.web.app import build_app
from service.web.logs import JsonFormatter

PATH = "/v1/images/generations"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
SECRET = "a purple xylophone nobody else may hear of"


def make_replica(checkpoint: Path, cache_dir: Path, **more: object) -> Replica:
    values = {"model": str(checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir} | more
    return Replica(load_settings(values))


class Lines(logging.Handler):
    """Log lines as the service writes them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(JsonFormatter())
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.written.append(self.format(record))


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Everything that any logger of this process says, as the service writes it."""
    lines = Lines()
    root, own = logging.getLogger(), logging.getLogger("fourstep")
    before = root.level, own.level, own.propagate
    own.propagate = True
    for logger in (root, own):
        logger.setLevel(logging.DEBUG)
    root.addHandler(lines)
    yield lines.written
    root.removeHandler(lines)
    root.setLevel(before[0])
    own.setLevel(before[1])
    own.propagate = before[2]


class Traced:
    """A service whose spans stay in memory."""

    def __init__(self, http: TestClient, replica: Replica) -> None:
        self.http, self.replica = http, replica

    def spans_of(self, body: Mapping[str, object], **headers: str) -> list[ReadableSpan]:
        """What one request leaves, in order of time; the exchange's own comes first."""
        exporter = InMemorySpanExporter()
        self.replica.tracing = Tracing(exporter)
        self.http.post(PATH, json=body, headers=headers)
        self.replica.tracing.close()
        self.replica.tracing = None
        spans = exporter.get_finished_spans()
        return sorted(spans, key=lambda span: (span.parent is not None, span.start_time))


@pytest.fixture(scope="module")
def traced(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[Traced]:
    replica = make_replica(lcm_checkpoint, cache_dir, num_threads=1, max_waiting=8)
    with TestClient(build_app(replica)) as http:
        yield Traced(http, replica)


def test_a_request_is_one_trace_from_queue_to_file(traced: Traced) -> None:
    root, *stages = traced.spans_of({"prompt": SECRET, "n": 2, "num_inference_steps": 3})
    names = [span.name for span in stages]
    assert root.name == f"POST {PATH}"
    assert names[0] == "queue"
    assert "encode_text" in names
    assert names[-1] == "response"
    assert names.count("denoise") >= 3
    assert names.count("decode") >= 1
    assert names.count("image_encode") == 2
    assert root.attributes is not None
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["gen_ai.request.model"] == "tiny-lcm"
    assert root.attributes["gen_ai.request.choice.count"] == 2
    for span in stages:
        assert span.parent is not None
        assert span.parent.span_id == root.context.span_id
        assert root.start_time <= span.start_time <= span.end_time <= root.end_time, span.name
    denoise = [span for span in stages if span.name == "denoise"]
    batches = [span.attributes["fourstep.batch.id"] for span in denoise if span.attributes]
    assert len(set(batches)) == len(batches)
    assert sum(span.attributes["fourstep.batch.rows"] for span in denoise if span.attributes) == 6
    for earlier, later in itertools.pairwise(denoise):
        assert earlier.end_time <= later.start_time, "one engine thread"
    assert "xylophone" not in "".join(span.to_json() for span in (root, *stages))


def test_it_goes_on_where_the_caller_is(traced: Traced) -> None:
    root, *stages = traced.spans_of({"prompt": "x"}, **SAMPLED)
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT_ID
    assert {f"{span.context.trace_id:032x}" for span in (root, *stages)} == {TRACE_ID}
    unsampled = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    assert traced.spans_of({"prompt": "x"}, **unsampled) == []


def test_failures_are_seen(traced: Traced) -> None:
    (root,) = traced.spans_of({"prompt": "x", "size": "1x1"})
    assert root.attributes is not None
    assert root.attributes["http.response.status_code"] == 400
    assert root.status.is_unset, "the caller's fault is no error of a server span"
    (shed,) = traced.spans_of({"prompt": "x", "n": 9})
    assert shed.attributes is not None
    assert shed.attributes["http.response.status_code"] == 429, "and was in no queue"
    body = {"prompt": "x", "n": 4, "sampler": "ddim", "num_inference_steps": 50}
    late, queue, *_ = traced.spans_of(body, **{"x-request-timeout": "0.001"})
    assert late.attributes is not None
    assert late.attributes["error.type"] == "504"
    assert not late.status.is_ok
    assert queue.name == "queue"


class Collector(ThreadingHTTPServer):
    """Receives OTLP over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_collector_gets_everything_by_the_standard_variables(
    collector: Collector,
    lcm_checkpoint: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_lines: list[str],
) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    replica = make_replica(lcm_checkpoint, cache_dir, num_threads=1, traces=True)
    with TestClient(build_app(replica)) as http:
        answer = http.post(PATH, json={"prompt": "x"}, headers=SAMPLED | {"x-request-id": "mine"})
        assert answer.status_code == 200
    # Leaving closed the replica, which sends what is left.
    (resource_spans,) = [part for sent in collector.requests for part in sent.resource_spans]
    resource = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
    assert resource["service.name"] == "pictures"
    assert resource["service.version"]
    spans = [span for scope in resource_spans.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    assert {"queue", "encode_text", "denoise", "decode", "image_encode", "response"} <= {
        s.name for s in spans
    }
    (server_span,) = [span for span in spans if span.kind == span.SPAN_KIND_SERVER]
    assert server_span.parent_span_id.hex() == PARENT_ID
    entries = [json.loads(line) for line in log_lines]
    (access,) = [entry for entry in entries if entry["logger"] == "fourstep.access"]
    assert (access["request_id"], access["trace_id"]) == ("mine", TRACE_ID)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.settings.OTLP_EXPORTER", "a-package-that-is-not-there")
    with pytest.raises(SettingsError, match=r"pip install 'fourstep\[otel\]'"):
        load_settings({"traces": True})
    load_settings()


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_no_prompt_is_ever_logged(
    traced: Traced, stream: bool, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": SECRET, "negative_prompt": SECRET, "stream": stream}

    def post(more: Mapping[str, object], timeout_s: float = 60) -> str:
        headers = {"x-request-timeout": str(timeout_s)}
        return traced.http.post(PATH, json=body | more, headers=headers).text

    assert "b64_json" in post({})
    for refused in ({"size": "1x1"}, {"prompt": SECRET * 1000}, {"prompt": [SECRET]}, {SECRET: 1}):
        assert "invalid_request_error" in post(refused)
    assert "deadline_exceeded" in post({"num_inference_steps": 50, "n": 4}, timeout_s=0.001)
    monkeypatch.setattr(traced.replica.runner._model.engines["vae_decoder"], "run", _fail)
    assert "engine_failure" in post({})
    logged = [json.loads(line) for line in log_lines]
    assert len([entry for entry in logged if entry["logger"] == "fourstep.access"]) == 7
    assert any("exception" in entry for entry in logged), "the failure was logged"
    assert "xylophone" not in "".join(log_lines)
    assert all("trace_id" not in entry for entry in logged), "there is none when traces are off"


def _fail(inputs: object) -> None:
    raise RuntimeError("device lost")
