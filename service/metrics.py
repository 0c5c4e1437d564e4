"""Prometheus metrics: what they are called, what they count, how they are shown.

The only module that imports ``prometheus_client``. With ``FOURSTEP_METRICS_DIR`` set (as
``fourstep serve`` does) every replica process of a node writes there and ``/metrics`` of any of
them shows the node's total.
"""

from __future__ import annotations

from service.scheduler import WorkKind
from service.settings import share_metrics

METRICS_ARE_SHARED = share_metrics()

from prometheus_client import (  # noqa: E402  (its import reads the environment set above)
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

# 1 ms to 30 s: an engine call of a small model on a GPU, up to a queued request on a CPU.
SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

STAGE_METRICS: dict[WorkKind, tuple[str, str]] = {
    WorkKind.ENCODE_TEXT: ("fourstep_text_encode_seconds", "One text encoder call."),
    WorkKind.ENCODE_IMAGE: ("fourstep_input_encode_seconds", "One VAE encoder call."),
    WorkKind.DENOISE: ("fourstep_denoise_step_seconds", "One denoise call (UNet and sampler)."),
    WorkKind.DECODE: ("fourstep_decode_seconds", "One VAE decoder call."),
}


class Metrics:
    """All metrics of one model; the engine loop's observer. Thread-safe."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        own = self.registry

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            metric = Histogram(name, text, ("model",), buckets=buckets, registry=own)
            return metric.labels(model)

        def gauge(name: str, text: str) -> Gauge:
            metric = Gauge(name, text, ("model",), multiprocess_mode="livesum", registry=own)
            return metric.labels(model)

        self._requests = Counter(
            "fourstep_requests_total",
            "Finished requests by endpoint and HTTP status; 499: the client went away.",
            ("model", "endpoint", "status"),
            registry=own,
        )
        self._model = model
        self._images = Counter(
            "fourstep_images_total", "Images delivered.", ("model",), registry=own
        ).labels(model)
        self._pixels = Counter(
            "fourstep_pixels_total", "Pixels of the images delivered.", ("model",), registry=own
        ).labels(model)
        self._request = Histogram(
            "fourstep_request_seconds",
            "From the parsed request to its last byte handed over.",
            ("model", "endpoint"),
            buckets=SECONDS,
            registry=own,
        )
        self._queue = histogram("fourstep_queue_seconds", "Admission to the first engine call.")
        self._image_encode = histogram("fourstep_image_encode_seconds", "One PNG, JPEG or WebP.")
        self._stages = {kind: histogram(*names) for kind, names in STAGE_METRICS.items()}
        self._batch_rows = Histogram(
            "fourstep_batch_rows", "Rows of one engine call.", ("model", "stage"),
            buckets=ROWS, registry=own,
        )  # fmt: skip
        self._rows_of = {kind: self._batch_rows.labels(model, kind.value) for kind in WorkKind}
        self._waiting = gauge("fourstep_waiting_rows", "Rows accepted and not yet admitted.")
        self._running = gauge("fourstep_running_rows", "Rows in flight.")

    # -- the engine loop's observer ----------------------------------------------------------

    def engine_call(self, kind: WorkKind, num_rows: int, num_lanes: int, seconds: float) -> None:
        self._stages[kind].observe(seconds)
        self._rows_of[kind].observe(num_rows)

    def rows(self, waiting: int, running: int) -> None:
        self._waiting.set(waiting)
        self._running.set(running)

    def queue_wait(self, seconds: float) -> None:
        self._queue.observe(seconds)

    # -- the handlers ------------------------------------------------------------------------

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count one finished request; ``endpoint`` is ``generations`` or ``edits``."""
        self._requests.labels(self._model, endpoint, str(status)).inc()
        self._request.labels(self._model, endpoint).observe(seconds)

    def image(self, width: int, height: int, encode_s: float) -> None:
        """Count one delivered image."""
        self._images.inc()
        self._pixels.inc(width * height)
        self._image_encode.observe(encode_s)

    def exposition(self) -> tuple[bytes, str]:
        """The text format and its media type: this process's, or the node's when shared."""
        registry = self.registry
        if METRICS_ARE_SHARED:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST
