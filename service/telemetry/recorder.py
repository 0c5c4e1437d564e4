"""The metrics thread: keeps the cost of metrics away from the engine threads.

The engine loop leaves what it observes in a queue, an append each; this thread writes it into the
metrics twice a second, with what changes by itself: readiness, padding, GPU memory. Every
exposition in this process writes what is left first.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping

from service.batching.scheduler import WorkKind
from service.telemetry.metrics import Metrics

INTERVAL_S = 0.5  # how old another replica's part of a node's metrics may be
KIND_OF_PART = {
    "text_encoder": WorkKind.ENCODE_TEXT,
    "vae_encoder": WorkKind.ENCODE_IMAGE,
    "tiny_vae_encoder": WorkKind.ENCODE_IMAGE,
    "denoiser": WorkKind.DENOISE,
    "vae_decoder": WorkKind.DECODE,
    "tiny_vae_decoder": WorkKind.DECODE,
}


class Recorder:
    """The engine loop's observer. ``padded_rows`` counts them by part, since the engine's start."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        ready: Callable[[], bool],
        padded_rows: Callable[[], Mapping[str, int]],
    ) -> None:
        self._metrics = metrics
        self._ready, self._padded_rows = ready, padded_rows
        self._calls: deque[tuple[WorkKind, int, int, float, float, str]] = deque()
        self._waits: deque[float] = deque()
        self._rows = (0, 0)
        self._padded: dict[str, int] = {}  # what has been counted; guarded by _writing
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fourstep-metrics", daemon=True)

    def start(self) -> None:
        self._padded = dict(self._padded_rows())  # warm-up's is not traffic's
        self._metrics.before_exposition = self.write
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.write()

    # -- the engine threads ------------------------------------------------------------------

    def engine_call(
        self,
        kind: WorkKind,
        num_rows: int,
        num_lanes: int,
        seconds: float,
        busy_s: float,
        decoder: str = "",
    ) -> None:
        self._calls.append((kind, num_rows, num_lanes, seconds, busy_s, decoder))

    def rows(self, waiting: int, running: int) -> None:
        self._rows = (waiting, running)

    def queue_wait(self, seconds: float) -> None:
        self._waits.append(seconds)

    # -- any thread --------------------------------------------------------------------------

    def write(self) -> None:
        """Bring the metrics up to date."""
        with self._writing:
            while self._calls:
                self._metrics.engine_call(*self._calls.popleft())
            while self._waits:
                self._metrics.queue_wait(self._waits.popleft())
            self._metrics.rows(*self._rows)
            self._metrics.ready(self._ready())
            for part, count in self._padded_rows().items():
                more = count - self._padded.get(part, 0)
                self._metrics.padding(KIND_OF_PART[part], more)
                self._padded[part] = count

    def _run(self) -> None:
        while not self._closing.wait(INTERVAL_S):
            self.write()
            if memory := gpu_memory():
                self._metrics.gpu_memory(*memory)


def gpu_memory() -> tuple[str, int, int] | None:
    """Id, free and total bytes of the GPU that this process draws on; None where it has none."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # Asking further would put a context on a GPU that is not used here.
        return None
    try:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return str(torch.cuda.get_device_properties().uuid), free_bytes, total_bytes
    except RuntimeError:  # a GPU in error: the engine's own failures say so
        return None
