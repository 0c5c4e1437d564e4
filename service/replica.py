"""One model, loaded and running: what a GPU (or a CPU) holds behind the HTTP surface.

Owns the runner, the engine loop, the metrics and the threads that encode images. Knows nothing of
HTTP paths or of Ray; `service.web.app` puts a surface on it, `service.ray_serve.deployment` a Ray
deployment.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from engines.build.bundle import Progress
from engines.drawing.runner import Runner
from service.access.quota import Quotas
from service.access.safety import Safety, load_safety
from service.batching.loop import EngineLoop
from service.batching.mailbox import Mailbox
from service.batching.scheduler import Limits
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.telemetry.recorder import Recorder

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

logger = logging.getLogger("fourstep.replica")


def open_runner(settings: Settings, progress: Progress = lambda *_: None) -> Runner:
    """The runner these settings ask for; blocks while the model loads.

    Raises:
        engines.errors.EngineError: the model cannot be loaded here; the message says why.
    """
    return Runner.open(settings.order, model_id=settings.model_id, progress=progress)


class BuildWatch:
    """Told how a bundle's build goes on: logs it, and knows how long it took; 0: none was built."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began_at: float | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        self._began_at = now if self._began_at is None else self._began_at
        self.seconds = now - self._began_at
        logger.info("bundle: %s (%d of %d)", what, done, total)


class Replica:
    """Constructed cheap; `start` loads and warms the engine, `close` drains and frees it."""

    def __init__(
        self, settings: Settings, open_runner: Callable[[Settings], Runner] | None = None
    ) -> None:
        self.settings = settings
        self._build = BuildWatch()
        self._open_runner = open_runner or self._open
        self.created = int(time.time())
        self.quotas = Quotas()
        self.image_workers = ThreadPoolExecutor(
            settings.num_image_workers or min(8, max(2, (os.cpu_count() or 1) // 4)),
            thread_name_prefix="fourstep-image",
        )
        self.safety: Safety | None = None  # by start, where a filter is set
        self._runner: Runner | None = None
        self._metrics: Metrics | None = None
        self._recorder: Recorder | None = None
        self.tracing: Tracing | None = None  # None: off, and nothing of it is imported
        self._loop: EngineLoop | None = None
        self._mailbox: Mailbox | None = None
        self._on_drain: list[Callable[[], None]] = []

    def start(self) -> None:
        """Load, warm up and begin to serve. Blocks for seconds, or minutes with a large model.

        Raises:
            engines.errors.EngineError: the model cannot be loaded here; the message says why.
            SettingsError: nor can the safety filter.
        """
        settings = self.settings
        begun = time.monotonic()
        if settings.traces:
            from service.telemetry.tracing import Tracing

            self.tracing = Tracing()
        self._runner = runner = self._open_runner(settings)
        runner.warm_up(settings.default_loras)
        # What stands now stands for good: the collector need not walk over it every few seconds,
        # holding up all threads.
        gc.collect()
        gc.freeze()
        self._metrics = Metrics(runner.info.model_id, max_age_s=settings.metrics_max_age_s)
        self.safety = load_safety(settings, self._metrics.safety_check)
        self._recorder = Recorder(
            self._metrics, ready=lambda: self.ready, padded_rows=runner.padded_rows
        )
        limits = Limits(
            max_batch=runner.info.max_batch,
            max_decode_batch=settings.max_decode_batch or runner.info.max_decode_batch,
            max_running=max(settings.max_running, runner.info.max_batch),
            patience=settings.patience,
            rows_that_fit=runner.rows_that_fit,
            one_of_a_kind=runner.device != "cpu",
        )
        self._loop = EngineLoop(
            runner,
            limits,
            self._recorder,
            num_threads=runner.info.max_calls,
            max_waiting=settings.max_waiting,
            max_call_s=settings.max_call_s,
        )
        self._loop.start()
        load_s = time.monotonic() - begun - self._build.seconds
        self._metrics.started(runner.info, build_s=self._build.seconds, load_s=load_s)
        self._recorder.start()
        logger.info(
            "serving %s on %s (%s), batches of %d, ready after %.1f s",
            runner.info.model_id, runner.info.backend, runner.info.backend_reason,
            limits.max_batch, time.monotonic() - begun,
        )  # fmt: skip

    def _open(self, settings: Settings) -> Runner:
        return open_runner(settings, self._build)

    @property
    def runner(self) -> Runner:
        assert self._runner is not None, "start() comes first"
        return self._runner

    @property
    def metrics(self) -> Metrics:
        assert self._metrics is not None, "start() comes first"
        return self._metrics

    @property
    def loop(self) -> EngineLoop:
        assert self._loop is not None, "start() comes first"
        return self._loop

    def mailbox(self) -> Mailbox:
        """Of the event loop that runs here: all jobs on it share one."""
        event_loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.event_loop is not event_loop:
            self._mailbox = Mailbox(event_loop)
        return self._mailbox

    @property
    def started(self) -> bool:
        """Whether `start` got through: metrics and model facts exist from then on."""
        return self._loop is not None

    @property
    def ready(self) -> bool:
        """Warmed up, serving, with its engine threads alive."""
        return self._loop is not None and self._loop.healthy

    def when_draining(self, call: Callable[[], None]) -> None:
        """Have ``call`` called, from any thread, when `drain` is."""
        self._on_drain.append(call)

    def drain(self) -> None:
        """This replica is about to close: what would stay open for long goes elsewhere."""
        for call in self._on_drain:
            call()

    def close(self) -> None:
        """Finish what runs (up to ``drain_s``), then free the engine and the threads."""
        if self._loop is not None:
            self._loop.close(self.settings.drain_s)
        if self._recorder is not None:
            self._recorder.close()
        if self.tracing is not None:
            self.tracing.close()
        if self._runner is not None:
            self._runner.close()
        self.image_workers.shutdown(cancel_futures=True)
