"""LitServe with batching, as its batching page shows: `max_batch_size`, `batch_timeout` on the API.

Each worker has an engine; requests wait as long as they must (`timeout=False`).
"""

from __future__ import annotations

from typing import Any

import litserve
import numpy as np
from starlette.responses import Response

from loadtests.peers.drawing import BATCH_WAIT_S, MAX_BATCH, BatchEngine, Options


class DrawingAPI(litserve.LitAPI):
    """Whole requests, collected by LitServe and drawn together."""

    def __init__(self, options: Options) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=BATCH_WAIT_S)
        self._options = options

    def setup(self, device: str) -> None:
        self._engine = BatchEngine(self._options)

    def predict(self, bodies: list[dict[str, Any]]) -> list[np.ndarray]:
        return self._engine.draw(bodies)

    def unbatch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        return images

    def encode_response(self, pixels: np.ndarray) -> Response:
        return Response(self._engine.png(pixels), media_type="image/png")


if __name__ == "__main__":
    options = Options.parse()
    server = litserve.LitServer(
        DrawingAPI(options), accelerator="cpu", workers_per_device=options.workers, timeout=False
    )
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")
