"""The applications that `mixed` compares, each served as `fourstep serve` serves its own.

`request_level` is the peer: Ray's `@serve.batch` over the same runner. The `gpu_shaped` pair puts a
timing double under both: it keeps time like a GPU and draws nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from engines.model import load_model
from engines.order import Order
from engines.runner import Runner
from loadtests.simulate import BATCH_WAIT_S, GPU_SHAPED
from service.app import build_app
from service.images import encode_image
from service.logs import configure_logs
from service.replica import Replica, open_runner
from service.serve import serve_here
from service.serve_config import Application, ServeConfig
from service.settings import Settings, load_settings

KINDS = ("fourstep", "request_level")
ENGINES = ("cpu", "gpu_shaped")
MAX_ONGOING_REQUESTS = 10_000  # of both: nothing is refused, what waits is what is measured


class TimingDoubleEngine:
    """Sleeps for as long as a GPU of `simulate.GPU_SHAPED` would compute, then returns zeros."""

    def __init__(self, part: str) -> None:
        self._fixed_s, self._per_row_s = (
            GPU_SHAPED.step if part == "denoiser" else GPU_SHAPED.decode
        )
        self._part = part

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sample = inputs["sample"] if self._part == "denoiser" else inputs["latents"]
        rows, _, height, width = sample.shape
        time.sleep(self._fixed_s + self._per_row_s * rows)
        if self._part == "denoiser":
            return {"next_sample": sample, "denoised": sample}
        return {"pixels": torch.zeros(rows, 8 * height, 8 * width, 3, dtype=torch.uint8)}

    def close(self) -> None:
        pass


def open_gpu_shaped(settings: Settings) -> Runner:
    """The model's tokenizer and text encoder, with timing doubles for the heavy parts."""
    order = Order(settings.model, "onnxruntime", cache_dir=settings.cache_dir, num_threads=1)
    model = load_model(order, lambda what, done, total: None)
    doubles = {part: TimingDoubleEngine(part) for part in ("denoiser", "vae_decoder")}
    model = dataclasses.replace(model, engines={**model.engines, **doubles})
    return Runner(model, max_batch=GPU_SHAPED.limits.max_batch)


def _opener(values: dict[str, Any]) -> Callable[[Settings], Runner]:
    return open_gpu_shaped if values.pop("gpu_shaped") else open_runner


@serve.deployment(name="fourstep", max_ongoing_requests=MAX_ONGOING_REQUESTS)
@serve.ingress()
class Fourstep:
    """The product's replica and app, unchanged but for the engine that may be put under it."""

    def __init__(self, values: dict[str, Any]) -> None:
        opener = _opener(values)
        settings = load_settings(values)
        configure_logs(settings.log_level)
        self.replica = Replica(settings, opener)

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self.replica, behind_ray=True)


@serve.deployment(name="request_level", max_ongoing_requests=MAX_ONGOING_REQUESTS)
class RequestLevel:
    """Whole requests collected by `@serve.batch` and drawn to the end together.

    Kinder than batching a diffusers pipeline: rows of all step counts share a run and cost nothing
    after their last step. The answers leave when the batch is done, as `@serve.batch` returns them.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        opener = _opener(values)
        self._settings = load_settings(values)
        self._runner = opener(self._settings)
        self._runner.warm_up()
        self._engine_thread = ThreadPoolExecutor(1)
        self._image_threads = ThreadPoolExecutor(self._settings.num_image_workers)

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return Response("ready")
        pixels = await self._draw_batch(await request.json())
        event_loop = asyncio.get_running_loop()
        data = await event_loop.run_in_executor(
            self._image_threads, encode_image, pixels, "png", self._settings
        )
        return Response(data, media_type="image/png")

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _draw_batch(self, bodies: list[dict[str, Any]]) -> list[Any]:
        event_loop = asyncio.get_running_loop()
        return await event_loop.run_in_executor(self._engine_thread, self._draw, bodies)

    def _draw(self, bodies: list[dict[str, Any]]) -> list[Any]:
        recipes = []
        for body in bodies:
            width, _, height = body["size"].partition("x")
            recipe = self._runner.default_recipe(
                body["seed"], body["prompt"], body["num_inference_steps"]
            )
            recipes.append(dataclasses.replace(recipe, width_px=int(width), height_px=int(height)))
        return [drawing.pixels for drawing in self._runner.draw(recipes)]


def build(args: dict[str, Any]) -> serve.Application:
    """``args``: the settings, plus ``kind`` and ``gpu_shaped``."""
    values = dict(args)
    deployment: Any = Fourstep if values.pop("kind") == "fourstep" else RequestLevel
    return deployment.options(ray_actor_options={"num_cpus": 1}).bind(values)


@dataclasses.dataclass(frozen=True, slots=True)
class _Compared(Application):
    """An application whose ``args`` are settings alone, until it is built."""

    kind: str = "fourstep"
    gpu_shaped: bool = False

    def build(self) -> Any:
        return build({**self.args, "kind": self.kind, "gpu_shaped": self.gpu_shaped})


def main(kind: str, engine: str, model: str, cache_dir: Path, port: int) -> int:
    """Serve one application until SIGINT or SIGTERM."""
    args = {"model": model, "cache_dir": str(cache_dir), "engine": "onnxruntime"}
    app = _Compared(kind, "/", args, kind=kind, gpu_shaped=engine == "gpu_shaped")
    return serve_here(ServeConfig((app,)), host="127.0.0.1", port=port)


if __name__ == "__main__":
    kind, engine, model, cache_dir, port = sys.argv[1:]
    from loadtests.apps import main as importable  # Ray pickles what lives in __main__ by value

    sys.exit(importable(kind, engine, model, Path(cache_dir), int(port)))
