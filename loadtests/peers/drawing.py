"""What the batching peers share: the product's engine, asked for whole batches of whole images.

A pipeline's call has one number of steps and one size, so a batch with several runs as several
calls, one after the other. With ``row_level`` the peers are lent what Fourstep is made of: rows of
all step counts share a run and cost nothing after their last step.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engines.drawing.runner import Runner
from engines.families.recipe import Recipe
from engines.order import DEFAULT_CACHE_DIR, Order
from loadtests.peers.sleeping import open_sleeping
from service.settings import Settings
from service.web.images import encode_image

MAX_BATCH = 8  # requests; the engine's own batches are smaller on a CPU, and the runner cuts them
BATCH_WAIT_S = 0.01  # Ray Serve's default, and what LitServe's examples use


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What every peer is started with."""

    model: str
    cache_dir: Path
    port: int
    gpu_shaped: bool = False
    row_level: bool = False  # rows of several step counts share an engine call, as ours do
    fast_png: bool = False  # our encoder instead of Pillow's, which the peers' examples use
    engine: str = "onnxruntime"  # of Fourstep itself, and what a double leaves of it
    workers: int = 1  # engines, which share the cores evenly
    probe_port: int | None = None  # where a system has one for probes alone

    @property
    def num_threads(self) -> int | None:
        """Of each engine; None: ONNX Runtime's choice, which is all cores."""
        return max(1, (os.cpu_count() or 1) // self.workers) if self.workers > 1 else None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"cache_dir": str(self.cache_dir)})

    @classmethod
    def from_json(cls, text: str) -> Options:
        values = json.loads(text)
        return cls(**values | {"cache_dir": Path(values["cache_dir"])})

    @classmethod
    def parse(cls) -> Options:
        parser = argparse.ArgumentParser()
        parser.add_argument("--model", default="demo-lcm")
        parser.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE_DIR)
        parser.add_argument("--port", type=int, required=True)
        parser.add_argument("--engine", default="onnxruntime")
        parser.add_argument("--workers", type=int, default=1)
        parser.add_argument("--probe-port", type=int)
        parser.add_argument("--gpu-shaped", action="store_true")
        parser.add_argument("--row-level", action="store_true")
        parser.add_argument("--fast-png", action="store_true")
        return cls(**vars(parser.parse_args()))


class BatchEngine:
    """Draws the bodies of a batch to the end, together; encodes one image."""

    def __init__(self, options: Options) -> None:
        if options.gpu_shaped:
            self._runner = open_sleeping(options.model, options.cache_dir)
        else:
            order = Order(
                options.model, "onnxruntime", cache_dir=options.cache_dir,
                num_threads=options.num_threads,
            )  # fmt: skip
            self._runner = Runner.open(order)
        self._runner.warm_up()
        self._row_level, self._fast_png = options.row_level, options.fast_png
        self._settings = Settings()

    def draw(self, bodies: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """Pixels uint8 ``[H, W, 3]`` of each body, in their order."""
        recipes = [self._recipe(body) for body in bodies]
        calls: dict[object, list[int]] = {}  # a pipeline's calls, by what all rows of one share
        for index, recipe in enumerate(recipes):
            shared = (recipe.num_steps, recipe.width_px, recipe.height_px)
            calls.setdefault(None if self._row_level else shared, []).append(index)
        found: dict[int, np.ndarray] = {}
        for indices in calls.values():
            drawings = self._runner.draw([recipes[index] for index in indices])
            for index, drawing in zip(indices, drawings, strict=True):
                assert drawing.pixels is not None, "drawn to the end"
                found[index] = drawing.pixels
        return [found[index] for index in range(len(recipes))]

    def _recipe(self, body: dict[str, Any]) -> Recipe:
        width, _, height = body["size"].partition("x")
        recipe = self._runner.default_recipe(
            body["seed"], body["prompt"], body["num_inference_steps"]
        )
        return dataclasses.replace(recipe, width_px=int(width), height_px=int(height))

    def png(self, pixels: np.ndarray) -> bytes:
        if self._fast_png:
            return encode_image(pixels, "png", self._settings)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()
