"""A bundle's parts to 8 bits: prompts are drawn in fp32, what the layers met is the range.

A part whose images are too far from fp32's keeps its linear layers, or stays as it is.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from engines.backends.adapters import Adapters
from engines.backends.choice import Choice
from engines.backends.engine import Engine
from engines.backends.onnxruntime_engine import Cores, OnnxRuntimeEngine
from engines.build.bundle import Progress
from engines.build.checkpoint import whole
from engines.build.quantising import WATCHED, quantise, ranges_of, watch
from engines.drawing import decoding
from engines.drawing.model import Model, parts_of
from engines.drawing.parity import MIN_IMAGE_PSNR_DB, psnr_db
from engines.drawing.runner import Runner
from engines.facts import Facts

FULL, TINY = decoding.PARTS["full"], decoding.PARTS["tiny"]
PARTS = {"denoiser": "full", FULL: "full", TINY: "tiny"}  # and the decoder it is judged by
# Many things, places and lights; whatever the model makes of them, its features are its own.
PROMPTS = (
    "a red circle on a white background",
    "two cats asleep on a blue chair, at night",
    "a small green house at the left, at night, outlined",
    "portrait of an old fisherman, oil on canvas",
    "a large yellow star at the center on a black background",
    "a city by the sea at dawn, photograph",
    "",
    "a purple flower in the rain",
)
MAX_STEPS = 8  # of a prompt: from the first to the last timestep, whatever the model's default
NUM_TRIED = 2  # of them, with other seeds, by which a part is judged


class _Watched:
    """An engine whose watched outputs are kept as lowest and highest values."""

    def __init__(self, engine: Engine) -> None:
        self.weight, self.refit, self.close = engine.weight, engine.refit, engine.close
        self._engine = engine
        self.beside: _Watched | None = None  # which is shown the same inputs
        self.outputs: dict[str, tuple[float, float]] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self._engine.run(inputs)
        if self.beside is not None:
            self.beside.run(inputs)
        for name in [name for name in found if name.startswith(WATCHED)]:
            value = found.pop(name)
            low, high = self.outputs.get(name, (np.inf, -np.inf))
            self.outputs[name] = min(low, float(value.min())), max(high, float(value.max()))
        return found


def quantise_parts(
    folder: Path, facts: Facts, progress: Progress, kind: str = ""
) -> dict[str, Any]:
    """Rewrite the parts of a bundle that is being built; what its manifest says of them.

    ``kind`` is as of `quantise`. ONNX Runtime draws in either case, on the CPU.
    """
    cores = Cores(None)
    names = [name for name in PARTS if name in parts_of(facts)]
    for name in names:
        watched = folder / f"{name}.watched.onnx"
        watch(folder / f"{name}.onnx", watched, linears=not kind)
    tokenizers = {
        window.tokenizer: whole(Tokenizer.from_file(str(folder / f"{window.tokenizer}.json")))
        for window in facts.windows
    }

    def model(engines: Mapping[str, Engine]) -> Model:
        choice = Choice("onnxruntime", "calibrates")
        return Model(facts, tokenizers, engines, Adapters({}, engines), choice, "fp32", "cpu")

    progress(f"drawing {len(PROMPTS)} prompts to calibrate", len(names), len(names) + 1)
    engines: dict[str, Engine] = {
        name: OnnxRuntimeEngine(folder / f"{name}.onnx", cores, "cpu")
        for name in parts_of(facts)
        if name not in names
    }
    watching = {
        name: _Watched(OnnxRuntimeEngine(folder / f"{name}.watched.onnx", cores, "cpu", 1))
        for name in names
    }
    engines |= watching
    drawn = model(engines)
    watching[FULL].beside = watching.get(TINY)
    _draw(drawn, range(len(PROMPTS)), first_seed=0)
    ranges = {name: ranges_of(engine.outputs) for name, engine in watching.items()}
    watching[FULL].beside = None
    exact = {decoder: _try(drawn, decoder) for decoder in facts.decoders}
    report: dict[str, Any] = {}
    for name in names:
        (folder / f"{name}.watched.onnx").unlink()
        if not ranges[name]:
            continue  # a tiny decoder of few channels
        report[name] = {"num_convolutions": 0, "num_linears": 0}
        for linears in (False,) if kind else (True, False):
            trial = _Trial(folder, name)
            counts = quantise(trial.path, ranges[name], kind, linears=linears)
            near = False
            if any(counts.values()):
                tried = OnnxRuntimeEngine(trial.path, cores, "cpu", for_plans=bool(kind))
                pictures = _try(model(engines | {name: tried}), PARTS[name])
                tried.close()
                pairs = zip(pictures, exact[PARTS[name]], strict=True)
                worst = min(psnr_db(picture, truth) for picture, truth in pairs)
                near = worst >= MIN_IMAGE_PSNR_DB
                report[name] |= {"psnr_db": round(worst, 1)} | (counts if near else {})
            trial.settle(keep_fp32=not near)
            if near:
                break
    for engine in engines.values():
        engine.close()
    return report


class _Trial:
    """A copy of a part, in a folder of its own, that may take its place."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._trial = folder / f"{name}.trial"
        self._trial.mkdir(exist_ok=True)
        for file in (f"{name}.onnx", f"{name}.onnx.data"):
            shutil.copyfile(folder / file, self._trial / file)
        self.path = self._trial / f"{name}.onnx"

    def settle(self, *, keep_fp32: bool) -> None:
        if not keep_fp32:
            for file in self._trial.iterdir():
                file.replace(self._folder / file.name)
        shutil.rmtree(self._trial)


def _draw(model: Model, indices: range, first_seed: int, decoder: str = "full") -> list[np.ndarray]:
    runner = Runner(model, max_batch=2)
    num_steps = min(MAX_STEPS, runner.info.default_num_steps)
    recipes = [
        dataclasses.replace(
            runner.default_recipe(first_seed + index, PROMPTS[index], num_steps), decoder=decoder
        )
        for index in indices
    ]
    pictures = [drawing.pixels for drawing in runner.draw(recipes)]
    return [picture for picture in pictures if picture is not None]


def _try(model: Model, decoder: str) -> list[np.ndarray]:
    """Other images than those that calibrate."""
    return _draw(model, range(NUM_TRIED), 100, decoder)
