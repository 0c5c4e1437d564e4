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
from engines.drawing.drawing import Drawing
from engines.drawing.model import Model, parts_of
from engines.drawing.parity import MIN_IMAGE_PSNR_DB, psnr_db
from engines.drawing.runner import Runner
from engines.facts import Facts

TINY = "tiny_vae_decoder"  # which previews are drawn by
PARTS = ("denoiser", "vae_decoder", TINY)
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
# Of a prompt: from the first to the last timestep, whatever the model's default. One has a preview.
MIN_STEPS, MAX_STEPS = 2, 8
NUM_TRIED = 2  # of them, with other seeds, by which a part is judged


class _Watched:
    """An engine whose watched outputs are kept as lowest and highest values."""

    def __init__(self, engine: Engine) -> None:
        self.weight, self.refit, self.close = engine.weight, engine.refit, engine.close
        self._engine = engine
        self.outputs: dict[str, tuple[float, float]] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self._engine.run(inputs)
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
        watch(folder / f"{name}.onnx", folder / f"{name}.watched.onnx")
    tokenizers = {
        window.tokenizer: whole(Tokenizer.from_file(str(folder / f"{window.tokenizer}.json")))
        for window in facts.windows
    }

    def model(engines: Mapping[str, Engine]) -> Model:
        choice = Choice("onnxruntime", "calibrates")
        return Model(facts, tokenizers, engines, Adapters({}, engines), choice, "fp32", "cpu")

    progress(f"drawing {len(PROMPTS)} prompts to calibrate", len(names), len(names) + 1)
    watched: dict[str, Engine] = {
        name: _Watched(OnnxRuntimeEngine(folder / f"{name}.watched.onnx", cores, "cpu", 1))
        for name in names
    }
    others = [name for name in parts_of(facts) if name not in names]
    engines = {name: OnnxRuntimeEngine(folder / f"{name}.onnx", cores, "cpu") for name in others}
    drawn = model({**engines, **watched})
    _draw(drawn, range(len(PROMPTS)), first_seed=0)
    exact = _draw(drawn, range(NUM_TRIED), first_seed=100)
    report: dict[str, Any] = {}
    for name in names:
        engine = watched[name]
        assert isinstance(engine, _Watched)
        found = ranges_of(engine.outputs)
        (folder / f"{name}.watched.onnx").unlink()
        if not found:
            continue  # a tiny decoder of few channels
        report[name] = {"num_convolutions": 0, "num_linears": 0}
        for linears in (False,) if kind else (True, False):
            trial = _Trial(folder, name)
            counts = quantise(trial.path, found, kind, linears=linears)
            tried = OnnxRuntimeEngine(trial.path, cores, "cpu")
            changed = model({**engines, **watched, name: tried})
            pairs = zip(_draw(changed, range(NUM_TRIED), first_seed=100), exact, strict=True)
            worst = min(psnr_db(*(_picture(each, name) for each in pair)) for pair in pairs)
            tried.close()
            near = worst >= MIN_IMAGE_PSNR_DB
            report[name] |= {"psnr_db": round(worst, 1)} | (counts if near else {})
            trial.settle(keep_fp32=not near)
            if near:
                break
    for engine in (*engines.values(), *watched.values()):
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


def _draw(model: Model, indices: range, first_seed: int) -> list[Drawing]:
    runner = Runner(model, max_batch=2)
    num_steps = max(MIN_STEPS, min(MAX_STEPS, runner.info.default_num_steps))
    previews = num_steps - 1 if TINY in model.engines else 0
    recipes = [
        dataclasses.replace(
            runner.default_recipe(first_seed + index, PROMPTS[index], num_steps),
            decoder="full", num_previews=previews,
        )
        for index in indices
    ]  # fmt: skip
    return runner.draw(recipes)


def _picture(drawing: Drawing, part: str) -> np.ndarray:
    """One that the part has drawn."""
    picture = drawing.previews[-1] if part == TINY else drawing.pixels
    assert picture is not None, "drawn to the end"
    return picture
