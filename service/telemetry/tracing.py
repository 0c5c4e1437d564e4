"""OpenTelemetry traces, sent by OTLP. The only module that imports ``opentelemetry``.

    POST /v1/images/generations     the caller's child, where it sent a W3C ``traceparent``
      ├─ queue                      admission to the first engine call
      ├─ encode_text, encode_image
      ├─ denoise …                  one for each batch that took a row of this request
      ├─ decode …
      ├─ image_encode …             PNG, JPEG or WebP
      └─ response                   the last image encoded to the last byte handed over

A batch serves several requests and belongs to none of their traces. Each gets a span of its own for
it, with the whole batch's size, so that one trace explains one slow request, and with its number
(``fourstep.batch.id``), which finds the others. (A span of the batch with links to its requests
would stand in a trace that nobody opens.) No prompt is ever recorded.

Spans are made from what the request remembers, once it has ended: the engine threads only append.
Endpoint, headers, sampling and the like are the standard ``OTEL_*`` variables, read by the SDK.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.batching.request import Request, StageRecord, Status
from service.telemetry.versions import version_of

# Names of OpenTelemetry's semantic conventions (HTTP 1.23, GenAI); ours begin with `fourstep.`.
METHOD, ROUTE, STATUS = "http.request.method", "http.route", "http.response.status_code"
ERROR_TYPE, MODEL, NUM_IMAGES = "error.type", "gen_ai.request.model", "gen_ai.request.choice.count"


class Tracing:
    """Makes a trace of each request and sends it in the background."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        version = version_of("fourstep")
        own = Resource.create(
            {
                "service.name": "fourstep",
                "service.version": version,
                "service.instance.id": str(os.getpid()),
            }
        )
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("fourstep", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self, method: str, route: str, request_id: str, headers: Iterable[tuple[bytes, bytes]]
    ) -> RequestTrace:
        """Begin the span of an HTTP exchange, below the caller's where it has named one."""
        carrier = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers
        }
        span = self._tracer.start_span(
            f"{method} {route}",
            context=self._propagator.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes={METHOD: method, ROUTE: route, "fourstep.request_id": request_id},
        )
        return RequestTrace(self._tracer, span)

    def close(self) -> None:
        """Send what is left; a receiver that does not answer is waited for as the SDK says."""
        self._provider.shutdown()


class RequestTrace:
    """The trace of one HTTP exchange, until `end`."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span
        self._request: Request | None = None
        self._epoch_ns = 0  # of the engine loop's clock

    @property
    def trace_id(self) -> str:
        return str(trace.format_trace_id(self._span.get_span_context().trace_id))

    def follow(self, request: Request, clock: Callable[[], float], model: str) -> None:
        """Have the request remember its way through the engine, if this trace is sampled at all."""
        if not self._span.is_recording():
            return
        self._epoch_ns = time.time_ns() - round(clock() * 1e9)
        self._request = request
        request.records = []
        recipe = request.rows[0].drawing.recipe
        self._span.set_attributes(
            {
                MODEL: model,
                NUM_IMAGES: len(request.rows),
                "fourstep.num_steps": recipe.num_steps,
                "fourstep.sampler": recipe.sampler,
                "fourstep.width_px": recipe.width_px,
                "fourstep.height_px": recipe.height_px,
            }
        )

    def end(self, status: int) -> None:
        request = self._request
        if request is not None and (request.status is not Status.WAITING or request.cancelled):
            self._end_stages(request)  # it was accepted
        self._span.set_attribute(STATUS, status)
        if status >= 500:
            self._span.set_attribute(ERROR_TYPE, str(status))
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()

    def _end_stages(self, request: Request) -> None:
        now, records = self._now(), list(request.records or ())
        first_call_at = min((record.started_at for record in records), default=now)
        records.append(StageRecord("queue", request.arrived_at, first_call_at - request.arrived_at))
        if request.status is Status.COMPLETED:
            finished_at = request.arrived_at + request.timings.total_s
            records.append(StageRecord("response", finished_at, max(0.0, now - finished_at)))
        below = trace.set_span_in_context(self._span)
        for record in records:
            attributes: dict[str, int] = {}
            if record.batch_id is not None:
                attributes = {
                    "fourstep.batch.id": record.batch_id,
                    "fourstep.batch.rows": record.num_rows,
                    "fourstep.batch.lanes": record.num_lanes,
                }
            span = self._tracer.start_span(
                record.stage,
                context=below,
                start_time=self._ns(record.started_at),
                attributes=attributes,
            )
            span.end(self._ns(record.started_at + record.seconds))

    def _now(self) -> float:
        return (time.time_ns() - self._epoch_ns) / 1e9

    def _ns(self, seconds: float) -> int:
        """Nanoseconds since 1970 of a time on the engine loop's clock."""
        return self._epoch_ns + round(seconds * 1e9)
