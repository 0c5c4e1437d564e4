"""Ray Serve with `@serve.batch`, as its guide to dynamic request batching shows.

Kinder than the guide: HAProxy, Ray's throughput settings and processes at normal priority, as
Fourstep has them; images are encoded in threads, so that the event loop stays free.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from loadtests.peers.drawing import BATCH_WAIT_S, MAX_BATCH, BatchEngine, Options
from service.ray_serve.serve import serve_here
from service.ray_serve.serve_config import Application, ServeConfig

MAX_ONGOING_REQUESTS = 10_000  # nothing is refused: what waits is what is measured


@serve.deployment(name="request_level", max_ongoing_requests=MAX_ONGOING_REQUESTS)
class RequestLevel:
    """Whole requests collected and drawn to the end together; answers leave when all are done."""

    def __init__(self, options: Options) -> None:
        self._engine = BatchEngine(options)
        self._engine_thread = ThreadPoolExecutor(1)
        self._image_threads = ThreadPoolExecutor(2)

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return Response("ready")
        pixels = await self._draw_batch(await request.json())
        event_loop = asyncio.get_running_loop()
        data = await event_loop.run_in_executor(self._image_threads, self._engine.png, pixels)
        return Response(data, media_type="image/png")

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _draw_batch(self, bodies: list[dict[str, Any]]) -> list[Any]:
        event_loop = asyncio.get_running_loop()
        return await event_loop.run_in_executor(self._engine_thread, self._engine.draw, bodies)


@dataclasses.dataclass(frozen=True, slots=True)
class _Bound(Application):
    """``args`` are what `serve_here` checks: the model. The options go to the replicas."""

    options: Options | None = None

    def build(self) -> Any:
        assert self.options is not None, "given below"
        deployment: Any = RequestLevel
        shape = {"num_replicas": self.options.workers, "ray_actor_options": {"num_cpus": 1}}
        return deployment.options(**shape).bind(self.options)


def main(options: Options) -> int:
    """Serve until SIGINT or SIGTERM."""
    args = {"model": options.model, "cache_dir": options.cache_dir, "engine": "onnxruntime"}
    args |= {"num_replicas": options.workers}
    app = _Bound("request_level", "/", args, options=options)
    return serve_here(ServeConfig((app,)), host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    from loadtests.peers.ray_serve import main as importable  # Ray pickles __main__ by value

    sys.exit(importable(Options.parse()))
