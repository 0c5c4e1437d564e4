"""BentoML with adaptive batching, as its page on that shows: `batchable`, a size and a latency.

The batch is of JSON objects and answers are base64 in JSON: the wrapper service that the page
proposes for other types would add a hop. Nothing is refused for lateness.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import bentoml

from loadtests.peers.drawing import MAX_BATCH, BatchEngine, Options

VARIABLE = "LOADTESTS_BENTOML"  # takes the options to the processes that BentoML starts
OPTIONS = Options.from_json(os.environ[VARIABLE]) if VARIABLE in os.environ else Options.parse()


@bentoml.service(workers=OPTIONS.workers, traffic={"timeout": 600, "max_concurrency": 10_000})
class Drawing:
    """Whole requests, collected by BentoML's dispatcher and drawn together."""

    def __init__(self) -> None:
        self._engine = BatchEngine(OPTIONS)

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=600_000)
    def generate(self, asks: list[dict[str, Any]]) -> list[str]:
        images = self._engine.draw(asks)
        return [base64.b64encode(self._engine.png(pixels)).decode() for pixels in images]


if __name__ == "__main__":
    os.environ |= {VARIABLE: OPTIONS.to_json(), "BENTOML_DO_NOT_TRACK": "True"}
    bentoml.serve(
        "loadtests.peers.bento_ml:Drawing", host="127.0.0.1", port=OPTIONS.port, blocking=True
    )
