"""Prometheus metrics: what they are called, what they count, how they are shown.

The only module that imports ``prometheus_client``. With ``FOURSTEP_METRICS_DIR`` set (as
``fourstep serve`` does) every replica process of a node writes there and ``/metrics`` of any of
them shows the node's total: counters of all processes there have been, gauges of those alive.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from service.batching.scheduler import WorkKind
from service.settings import share_metrics
from service.telemetry.clips import ClipMetrics
from service.telemetry.liveness import declare_alive, find_dead
from service.telemetry.versions import version_of

SHARED_FOLDER = share_metrics()

from prometheus_client import (  # noqa: E402  (its import reads the environment set above)
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
    multiprocess,
    start_http_server,
)

if TYPE_CHECKING:
    from engines.drawing.info import ModelInfo

# An engine call: 1 ms (a small model's text encoder on a GPU) to 10 s (a real one's step on a CPU).
CALL_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
# What a client waits for: 5 ms to 30 s, closer where users feel it. deploy/prometheus/rules.yaml
# has its latency objective at one of these bounds.
WAIT_SECONDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0,
    20.0, 30.0,
)  # fmt: skip
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SKIP_REASONS = ("superseded", "similar", "shed")
ENDPOINTS = ("generations", "edits", "videos")
# Exist from the start, at 0, so that their first increase is one.
STATUSES = (200, 400, 429, 499, 500, 503, 504)

STAGE_METRICS: dict[WorkKind, tuple[str, str]] = {
    WorkKind.ENCODE_TEXT: ("fourstep_text_encode_seconds", "One text encoder call."),
    WorkKind.ENCODE_IMAGE: ("fourstep_input_encode_seconds", "One VAE encoder call."),
    WorkKind.DENOISE: ("fourstep_denoise_step_seconds", "One denoise call (UNet and sampler)."),
}


class Metrics:
    """All metrics of one model. Thread-safe; it can be an engine loop's observer itself.

    ``max_age_s``: for so long an exposition is given again, whoever asks. One of a node takes some
    milliseconds of Python, which engines and handlers wait for.
    """

    def __init__(self, model: str, *, max_age_s: float = 0.0) -> None:
        if SHARED_FOLDER:
            declare_alive(SHARED_FOLDER, multiprocess.mark_process_dead)
        self.registry = CollectorRegistry()
        self.before_exposition: Callable[[], None] = lambda: None  # brings the values up to date
        self._exposing = threading.Lock()
        self._exposed, self._exposed_at, self._max_age_s = b"", -math.inf, max_age_s
        self._model = model
        self._requests = self.counter(
            "fourstep_requests_total",
            "Finished requests by endpoint and HTTP status; 499: the client went away.",
            "endpoint",
            "status",
        )
        self._images = self.counter("fourstep_images_total", "Images delivered.").labels(model)
        self._pixels = self.counter(
            "fourstep_pixels_total", "Pixels of the images delivered."
        ).labels(model)
        self._request = self.histogram(
            "fourstep_request_seconds",
            "Requests answered with 200: from the first header to the last byte handed over.",
            WAIT_SECONDS,
            "endpoint",
        )
        self._queue = self.histogram(
            "fourstep_queue_seconds", "Admission to the first engine call.", WAIT_SECONDS
        ).labels(model)
        self._first_preview = self.histogram(
            "fourstep_first_preview_seconds",
            "Admission to the first preview, where previews were asked for.",
            WAIT_SECONDS,
        ).labels(model)
        self._image_encode = self.histogram(
            "fourstep_image_encode_seconds", "One PNG, JPEG or WebP.", CALL_SECONDS
        ).labels(model)
        self._safety = self.counter(
            "fourstep_safety_checks_total",
            "What the safety filter looked at (prompt, preview, image) and found.",
            "stage",
            "outcome",
        )
        self._make_kept_metrics()
        self._make_live_metrics()
        self.clips = ClipMetrics(self, model)
        self._make_engine_metrics(model)
        self._make_replica_metrics(model)
        for endpoint in ENDPOINTS:
            if endpoint != "videos":
                self._request.labels(model, endpoint)
            for status in STATUSES:
                self._requests.labels(model, endpoint, str(status))
        self._starts.inc()
        self._replicas.set(1)

    def _make_kept_metrics(self) -> None:
        lookups = self.counter(
            "fourstep_image_cache_lookups_total",
            "Images with explicit seeds that were looked up in the image cache: hit or miss.",
            "outcome",
        )
        self._cache_lookups = {
            hit: lookups.labels(self._model, outcome)
            for hit, outcome in ((True, "hit"), (False, "miss"))
        }
        self._cache_bytes = self.gauge("fourstep_image_cache_bytes", "Images in image caches.")
        # The replicas of a node share one folder: theirs is the same value, seen at other times.
        self._files = self.gauge(
            "fourstep_image_files", "Images kept for `url` answers.", "livemostrecent"
        )
        self._file_bytes = self.gauge(
            "fourstep_image_files_bytes", "Bytes of the images kept.", "livemostrecent"
        )

    def _make_live_metrics(self) -> None:
        self._live_sessions = self.gauge("fourstep_live_sessions", "Live sessions that are open.")
        skipped = self.counter(
            "fourstep_live_frames_skipped_total",
            "Frames of live sessions that were not drawn to their end, by why.",
            "reason",
        )
        self._live_skipped = {
            reason: skipped.labels(self._model, reason) for reason in SKIP_REASONS
        }
        self._live_frame = self.histogram(
            "fourstep_live_frame_seconds",
            "Frames of live sessions: from the turn of one to its encoded picture.",
            WAIT_SECONDS,
        ).labels(self._model)

    def _make_engine_metrics(self, model: str) -> None:
        self._stages = {
            kind: self.histogram(*names, CALL_SECONDS).labels(model)
            for kind, names in STAGE_METRICS.items()
        }
        self._decode = self.histogram(
            "fourstep_decode_seconds", "One VAE decoder call.", CALL_SECONDS, "decoder"
        )
        self._decode.labels(model, "full")  # every model has it: there from the start
        rows = self.histogram("fourstep_batch_rows", "Rows of one engine call.", ROWS, "stage")
        self._rows_of = {kind: rows.labels(model, kind.value) for kind in WorkKind}
        busy = self.counter(
            "fourstep_engine_busy_seconds_total",
            "Time with an engine call running, by the call that ends; its rate is the share of it.",
            "stage",
        )
        self._busy = {kind: busy.labels(model, kind.value) for kind in WorkKind}
        lanes = self.counter(
            "fourstep_engine_lanes_total",
            "Lanes that engine calls ran: used by rows, or padding up to a size a plan takes.",
            "stage",
            "use",
        )
        self._used = {kind: lanes.labels(model, kind.value, "row") for kind in WorkKind}
        self._padding = {kind: lanes.labels(model, kind.value, "padding") for kind in WorkKind}
        self._waiting = self.gauge("fourstep_waiting_rows", "Rows accepted and not yet admitted.")
        self._running = self.gauge("fourstep_running_rows", "Rows in flight.")

    def _make_replica_metrics(self, model: str) -> None:
        self._starts = self.counter(
            "fourstep_replica_starts_total", "Replicas that have loaded the model."
        ).labels(model)
        self._replicas = self.gauge("fourstep_replicas", "Replica processes that are alive.")
        self._ready = self.gauge("fourstep_ready_replicas", "Replicas that accept work.")
        self._build = self.gauge(
            "fourstep_bundle_build_seconds",
            "Building the bundle at start; 0: it was there.",
            "livemax",
        )
        self._load = self.gauge(
            "fourstep_load_seconds",
            "Loading and warming the model up, after any build.",
            "livemax",
        )
        self._engine = Gauge(
            "fourstep_engine_info", "What draws here; always 1.",
            ("model", "family", "backend", "precision", "engine_version", "version"),
            multiprocess_mode="livemax", registry=self.registry,
        )  # fmt: skip
        self._gpu_memory = Gauge(
            "fourstep_gpu_memory_bytes", "Memory of a replica's GPU, by whomever it is used.",
            ("gpu", "state"), multiprocess_mode="livemostrecent", registry=self.registry,
        )  # fmt: skip

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model", *labels), registry=self.registry)

    def histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        names = ("model", *labels)
        return Histogram(name, text, names, buckets=buckets, registry=self.registry)

    def gauge(
        self,
        name: str,
        text: str,
        mode: Literal["livesum", "livemax", "livemostrecent"] = "livesum",
    ) -> Gauge:
        """``mode`` says how the values of a node's replicas become one."""
        gauge = Gauge(name, text, ("model",), multiprocess_mode=mode, registry=self.registry)
        return gauge.labels(self._model)

    # -- the engine loop's observer ----------------------------------------------------------

    def engine_call(
        self,
        kind: WorkKind,
        num_rows: int,
        num_lanes: int,
        seconds: float,
        busy_s: float,
        decoder: str = "",
    ) -> None:
        if kind is WorkKind.DECODE:
            self._decode.labels(self._model, decoder).observe(seconds)
        else:
            self._stages[kind].observe(seconds)
        self._busy[kind].inc(busy_s)
        self._rows_of[kind].observe(num_rows)
        # Only a denoise call runs the second lane of a guided row.
        self._used[kind].inc(num_lanes if kind is WorkKind.DENOISE else num_rows)

    def rows(self, waiting: int, running: int) -> None:
        self._waiting.set(waiting)
        self._running.set(running)

    def queue_wait(self, seconds: float) -> None:
        self._queue.observe(seconds)

    # -- the handlers ------------------------------------------------------------------------

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count one finished request; ``endpoint`` is one of `ENDPOINTS`.

        A clip's has times of its own: an accepted job is quick, and a clip slow.
        """
        self._requests.labels(self._model, endpoint, str(status)).inc()
        # A refusal is quick, and would make an overload look fast.
        if status == 200 and endpoint != "videos":
            self._request.labels(self._model, endpoint).observe(seconds)

    def first_preview(self, seconds: float) -> None:
        self._first_preview.observe(seconds)

    def image(self, width: int, height: int, encode_s: float | None) -> None:
        """Count one delivered image; None: it was encoded for an earlier request."""
        self._images.inc()
        self._pixels.inc(width * height)
        if encode_s is not None:
            self._image_encode.observe(encode_s)

    def cache_lookup(self, hit: bool) -> None:
        self._cache_lookups[hit].inc()

    def cache_bytes(self, num_bytes: int) -> None:
        self._cache_bytes.set(num_bytes)

    def image_files(self, num_files: int, num_bytes: int) -> None:
        """What is kept for `url` answers, as a replica has just seen it."""
        self._files.set(num_files)
        self._file_bytes.set(num_bytes)

    def safety_check(self, stage: str, outcome: str) -> None:
        """Count one; ``outcome`` is ``passed``, ``filtered`` or ``error``."""
        self._safety.labels(self._model, stage, outcome).inc()

    def live_sessions(self, num_open: int) -> None:
        self._live_sessions.set(num_open)

    def live_frame(self, seconds: float) -> None:
        """Count one that was drawn."""
        self._live_frame.observe(seconds)

    def live_skipped(self, reason: str) -> None:
        """Count one that was not; ``reason`` is one of `SKIP_REASONS`."""
        self._live_skipped[reason].inc()

    # -- the replica -------------------------------------------------------------------------

    def started(self, info: ModelInfo, *, build_s: float, load_s: float) -> None:
        """What was loaded, and how long that took."""
        self._build.set(build_s)
        self._load.set(load_s)
        self._engine.labels(
            info.model_id, info.family, info.backend, info.precision,
            version_of(info.backend), version_of("fourstep"),
        ).set(1)  # fmt: skip

    def ready(self, ready: bool) -> None:
        self._ready.set(int(ready))

    def padding(self, kind: WorkKind, num_lanes: int) -> None:
        """Count lanes that an engine ran for nobody."""
        self._padding[kind].inc(num_lanes)

    def gpu_memory(self, gpu: str, free_bytes: int, total_bytes: int) -> None:
        self._gpu_memory.labels(gpu, "free").set(free_bytes)
        self._gpu_memory.labels(gpu, "used").set(total_bytes - free_bytes)

    def exposition(self) -> tuple[bytes, str]:
        """The text format and its media type: this process's, or the node's when shared."""
        with self._exposing:
            if time.monotonic() - self._exposed_at >= self._max_age_s:
                self.before_exposition()
                registry = node_registry(SHARED_FOLDER) if SHARED_FOLDER else self.registry
                self._exposed = generate_latest(registry)
                self._exposed_at = time.monotonic()
            return self._exposed, CONTENT_TYPE_LATEST


class _NodeCollector(multiprocess.MultiProcessCollector):
    """What all replicas of a node have written, without the gauges of those that have ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None, path=str(folder))  # type: ignore[no-untyped-call]
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        dead = find_dead(self._folder)
        files = [str(file) for file in self._folder.glob("*.db") if not _is_gauge_of(dead, file)]
        return self.merge(files)  # type: ignore[no-untyped-call, no-any-return]


def node_registry(folder: Path) -> CollectorRegistry:
    """The metrics of a node whose replicas write into ``folder``."""
    registry = CollectorRegistry()
    registry.register(_NodeCollector(folder))
    return registry


def _is_gauge_of(pids: set[int], file: Path) -> bool:
    """Of files as prometheus_client names them: ``gauge_livesum_PID.db``."""
    return file.name.startswith("gauge_live") and int(file.stem.rpartition("_")[2]) in pids


def export(folder: Path, port: int) -> None:
    """Answer on ``port`` of every address with the total of ``folder``, from threads of its own.

    For a sidecar: a scrape depends on no replica, and what an ended one had counted stays counted.

    Raises:
        OSError: the port is taken.
    """
    start_http_server(port, registry=node_registry(folder))
