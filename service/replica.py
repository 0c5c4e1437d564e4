"""One model, loaded and running: what a GPU (or a CPU) holds behind the HTTP surface.

Owns the runner, the engine loop, the metrics and the threads that encode images. Knows nothing of
HTTP paths or of Ray; `service.app` puts a surface on it, `service.deployment` a Ray deployment.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engines.runner import Runner
from service.loop import EngineLoop
from service.metrics import Metrics
from service.quota import Quotas
from service.scheduler import Limits
from service.settings import Settings

logger = logging.getLogger("fourstep.replica")


def open_runner(settings: Settings) -> Runner:
    """The runner these settings ask for; blocks while the model loads.

    Raises:
        engines.errors.EngineError: the model cannot be loaded here; the message says why.
    """
    return Runner.open(settings.order, model_id=settings.model_id)


class Replica:
    """Constructed cheap; `start` loads and warms the engine, `close` drains and frees it."""

    def __init__(
        self, settings: Settings, open_runner: Callable[[Settings], Runner] = open_runner
    ) -> None:
        self.settings = settings
        self._open_runner = open_runner
        self.created = int(time.time())
        self.quotas = Quotas()
        self.image_workers = ThreadPoolExecutor(
            settings.num_image_workers, thread_name_prefix="fourstep-image"
        )
        self._runner: Runner | None = None
        self._metrics: Metrics | None = None
        self._loop: EngineLoop | None = None

    def start(self) -> None:
        """Load, warm up and begin to serve. Blocks for seconds, or minutes with a large model.

        Raises:
            engines.errors.EngineError: the model cannot be loaded here; the message says why.
        """
        settings = self.settings
        begun = time.monotonic()
        self._runner = runner = self._open_runner(settings)
        runner.warm_up(settings.default_loras)
        self._metrics = Metrics(runner.info.model_id)
        limits = Limits(
            max_batch=runner.info.max_batch,
            max_decode_batch=settings.max_decode_batch or max(1, runner.info.max_batch // 2),
            max_running=max(settings.max_running, runner.info.max_batch),
            patience=settings.patience,
        )
        self._loop = EngineLoop(
            runner,
            limits,
            self._metrics,
            max_waiting=settings.max_waiting,
            max_call_s=settings.max_call_s,
        )
        self._loop.start()
        logger.info(
            "serving %s on %s (%s), batches of %d, ready after %.1f s",
            runner.info.model_id, runner.info.backend, runner.info.backend_reason,
            limits.max_batch, time.monotonic() - begun,
        )  # fmt: skip

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

    @property
    def started(self) -> bool:
        """Whether `start` got through: metrics and model facts exist from then on."""
        return self._loop is not None

    @property
    def ready(self) -> bool:
        """Warmed up, serving, with its engine thread alive."""
        return self._loop is not None and self._loop.healthy

    def close(self) -> None:
        """Finish what runs (up to ``drain_s``), then free the engine and the threads."""
        if self._loop is not None:
            self._loop.close(self.settings.drain_s)
        if self._runner is not None:
            self._runner.close()
        self.image_workers.shutdown(cancel_futures=True)
