"""BentoML with adaptive batching, as its page on that shows: `batchable`, a size and a latency.

The batch is of JSON objects and answers are base64 in JSON: the wrapper service that the page
proposes for other types would add a hop. Nothing is refused for lateness.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import bentoml

from loadtests.peers.drawing import MAX_BATCH, BatchEngine, Options

OPTIONS = "LOADTESTS_BENTOML"  # the environment variable that takes the options to the workers


@bentoml.service(workers=1, traffic={"timeout": 600, "max_concurrency": 10_000})
class Drawing:
    """Whole requests, collected by BentoML's dispatcher and drawn together."""

    def __init__(self) -> None:
        values = json.loads(os.environ[OPTIONS])
        self._engine = BatchEngine(values.pop("model"), Path(values.pop("cache_dir")), **values)

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=600_000)
    def generate(self, asks: list[dict[str, Any]]) -> list[str]:
        images = self._engine.draw(asks)
        return [base64.b64encode(self._engine.png(pixels)).decode() for pixels in images]


if __name__ == "__main__":
    options = Options.parse()
    os.environ[OPTIONS] = json.dumps(
        {
            "model": options.model,
            "cache_dir": str(options.cache_dir),
            "gpu_shaped": options.gpu_shaped,
            "fast_png": options.fast_png,
        }
    )
    os.environ |= {"BENTOML_DO_NOT_TRACK": "True"}
    bentoml.serve(
        "loadtests.peers.bento_ml:Drawing", host="127.0.0.1", port=options.port, blocking=True
    )
