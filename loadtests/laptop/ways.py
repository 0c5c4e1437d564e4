"""The ways to draw, each over the same checkpoint: `python -m loadtests.laptop.ways TASK`.

A way loads, draws one step with each decoder, for what is called first allocates, then an image
with each. Its process ends with it, so that memory is its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.backends.engine import Engine, Variant
from engines.order import Order
from loadtests.laptop.task import CLOCKS, DECODERS, PROMPT, SEED, Drawn, Task
from loadtests.peak import matrix_peak

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it tells nobody then
PARTS = {"vae_decoder": "full", "tiny_vae_decoder": "tiny"}


class Clock:
    """Seconds of calls by what they were."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.steps: list[float] = []
        self.decodes: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        begun = self.now()
        yield
        self.steps.append(self.now() - begun)

    @contextlib.contextmanager
    def decode(self, decoder: str) -> Iterator[None]:
        begun = self.now()
        yield
        self.decodes[decoder] = self.now() - begun


Draw = Callable[[int, str], np.ndarray]  # steps and decoder to pixels uint8 [H, W, 3]


class Timed:
    """An engine of the product's whose calls are timed."""

    def __init__(self, part: str, engine: Engine, clock: Clock) -> None:
        self._part, self._engine, self._clock = part, engine, clock
        self.weight, self.refit, self.close = engine.weight, engine.refit, engine.close

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._part == "denoiser":
            with self._clock.step():
                return self._engine.run(inputs)
        if decoder := PARTS.get(self._part):
            with self._clock.decode(decoder):
                return self._engine.run(inputs)
        return self._engine.run(inputs)


def onnxruntime(task: Task, clock: Clock) -> Draw:
    """The product by ONNX Runtime, from a bundle that is built beforehand."""
    return _product("onnxruntime", task, clock)


def openvino_backend(task: Task, clock: Clock) -> Draw:
    """The product by OpenVINO, from the same bundle."""
    return _product("openvino", task, clock)


def torch_cpu(task: Task, clock: Clock) -> Draw:
    """The product by torch, from the checkpoint."""
    return _product("torch", task, clock)


def order_of(backend: str, task: Task) -> Order:
    return Order(
        str(task.checkpoint), backend, task.precision, task.cache_dir, task.num_threads,
        device="cpu", tiny_vae=str(task.tiny_vae),
    )  # fmt: skip


def _product(backend: str, task: Task, clock: Clock) -> Draw:
    from engines.drawing.model import load_model

    return _over(load_model(order_of(backend, task), lambda what, done, total: None), task, clock)


def _over(model: Any, task: Task, clock: Clock) -> Draw:
    """The product's runner over a model."""
    from engines.drawing.runner import Runner

    engines = {name: Timed(name, engine, clock) for name, engine in model.engines.items()}
    runner = Runner(dataclasses.replace(model, engines=engines), max_batch=1)

    def draw(num_steps: int, decoder: str) -> np.ndarray:
        recipe = dataclasses.replace(
            runner.default_recipe(SEED, PROMPT, num_steps),
            width_px=task.size_px, height_px=task.size_px, decoder=decoder,
        )  # fmt: skip
        pixels = runner.draw([recipe])[0].pixels
        assert pixels is not None, "drawn to the end"
        return pixels

    return draw


def diffusers(task: Task, clock: Clock) -> Draw:
    """diffusers' own pipeline, as its documentation has it."""
    from diffusers import AutoencoderTiny, LatentConsistencyModelPipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[task.precision]
    pipeline = LatentConsistencyModelPipeline.from_pretrained(task.checkpoint, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    vaes = {
        "full": pipeline.vae,
        "tiny": AutoencoderTiny.from_pretrained(task.tiny_vae, torch_dtype=dtype),
    }
    pipeline.unet.forward = _within(pipeline.unet.forward, clock.step)
    for decoder, vae in vaes.items():
        vae.decode = _within(vae.decode, functools.partial(clock.decode, decoder))

    def draw(num_steps: int, decoder: str) -> np.ndarray:
        pipeline.register_modules(vae=vaes[decoder])
        image = pipeline(
            PROMPT, num_inference_steps=num_steps, width=task.size_px, height=task.size_px,
            generator=torch.Generator().manual_seed(SEED), output_type="pil",
        ).images[0]  # fmt: skip
        return np.asarray(image)

    return draw


def _within(call: Callable[..., Any], clock: Callable[[], Any]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        with clock():
            return call(*arguments, **named)

    return timed


class OpenVinoEngine:
    """A part of the model as OpenVINO converts it from torch, of one size. In w8 its weights are
    compressed as optimum-intel does it (``load_in_8bit``), in int8 `quantise` puts all in 8 bits.
    """

    def __init__(self, part: Any, task: Task, sizes: Mapping[str, int]) -> None:
        import openvino

        from loadtests.torch_flops import inputs_of

        example = {
            name: torch.zeros(value.shape, dtype=value.dtype)
            for name, value in inputs_of(part, sizes).items()
        }
        with torch.inference_mode():
            model = openvino.convert_model(part.module.eval(), example_input=example)
        model.reshape({name: list(value.shape) for name, value in example.items()})
        if task.precision == "w8":
            import nncf

            model = nncf.compress_weights(model)
        self._hints = {
            "INFERENCE_PRECISION_HINT": "f32" if task.precision == "fp32" else "bf16",
            "INFERENCE_NUM_THREADS": task.num_threads,
        }
        self._model, self._outputs = model, part.outputs
        self._seen: list[dict[str, np.ndarray]] | None = [] if task.precision == "int8" else None
        self._compile()

    def _compile(self) -> None:
        import openvino

        self._compiled = openvino.Core().compile_model(self._model, "CPU", self._hints)

    def quantise(self) -> None:
        """Weights and activations in 8 bits, by what it was called with; NNCF's own choice of which
        for a transformer.
        """
        import nncf

        assert self._seen, "it was called"
        self._model = nncf.quantize(
            self._model, nncf.Dataset(self._seen), subset_size=len(self._seen),
            model_type=nncf.ModelType.TRANSFORMER,
        )  # fmt: skip
        self._seen = None
        self._compile()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {name: value.numpy() for name, value in inputs.items()}
        if self._seen is not None:
            self._seen.append({name: value.copy() for name, value in given.items()})
        found = self._compiled(given)
        return {
            name: torch.from_numpy(np.array(found[index]))
            for index, name in enumerate(self._outputs)
        }

    def weight(self, name: str) -> Tensor:
        raise NotImplementedError("nothing here is refitted")

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        pass  # the one set that there is

    def close(self) -> None:
        pass


def openvino(task: Task, clock: Clock) -> Draw:
    """What FastSD CPU draws with, OpenVINO, under the product's runner."""
    from engines.backends.adapters import Adapters
    from engines.backends.choice import Choice
    from engines.build.checkpoint import load_facts, load_pipeline, tokenizer_of
    from engines.build.source import Overrides
    from engines.drawing.model import Model
    from engines.families import family_named

    overrides = Overrides({"tiny_vae": task.tiny_vae})
    pipeline = load_pipeline(task.checkpoint, "fp32", overrides)
    facts = load_facts(task.checkpoint, pipeline, overrides)
    side = task.size_px // facts.vae_scale_factor
    sizes = {"batch": 1, "rows": side, "columns": side}
    parts = [
        part
        for part in family_named(facts.family).parts(pipeline, facts)
        if not part.name.endswith("vae_encoder")
    ]
    engines = {part.name: OpenVinoEngine(part, task, sizes) for part in parts}
    model = Model(
        facts, {"tokenizer": tokenizer_of(pipeline)}, engines, Adapters({}, engines),
        Choice("openvino", "measured"), task.precision, "cpu",
    )  # fmt: skip
    draw = _over(model, task, clock)
    if task.precision == "int8":
        for decoder in DECODERS:
            draw(4, decoder)  # what calls are given at every noise level
        for name in ("denoiser", *PARTS):
            engines[name].quantise()
    return draw


def sd_cpp(task: Task, clock: Clock) -> Draw:
    """stable-diffusion.cpp by its Python binding: whole images, whose calls it does not show."""
    from stable_diffusion_cpp import StableDiffusion

    opened = {
        decoder: StableDiffusion(
            model_path=str(task.checkpoint), n_threads=task.num_threads, verbose=False,
            **({"taesd_path": str(_weights(task.tiny_vae))} if decoder == "tiny" else {}),
        )
        for decoder in DECODERS
    }  # fmt: skip

    def draw(num_steps: int, decoder: str) -> np.ndarray:
        image = opened[decoder].generate_image(
            prompt=PROMPT, width=task.size_px, height=task.size_px, sample_steps=num_steps,
            cfg_scale=1.0, sample_method="lcm", seed=SEED,
        )[0]  # fmt: skip
        return np.asarray(image)

    return draw


def _weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


WAYS: dict[str, Callable[[Task, Clock], Draw]] = {
    way.__name__: way
    for way in (onnxruntime, openvino_backend, torch_cpu, diffusers, openvino, sd_cpp)
}


def measure(task: Task) -> Drawn:
    """Load, warm up, draw; the picture is written."""
    torch.set_num_threads(task.num_threads)
    now = CLOCKS[task.clock]
    drawn, clock = Drawn(num_steps=task.num_steps), Clock(now)
    side = min(2048, 4 * task.size_px)
    arithmetic = {"w8": "bf16"}.get(task.precision, task.precision)
    drawn.peak_flops_per_s = matrix_peak(arithmetic, "cpu", side, now)
    begun = now()
    draw = WAYS[task.way](task, clock)
    drawn.load_s, begun = now() - begun, now()
    draw(1, "tiny")
    drawn.first_s = now() - begun
    draw(1, "full")
    draw(1, "tiny")
    clock.steps.clear()
    begun = now()
    pixels = draw(task.num_steps, "full")
    drawn.image_s = now() - begun
    drawn.step_s, drawn.decode_s = clock.steps, clock.decodes
    drawn.peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    np.save(task.pixels, pixels)
    return drawn


if __name__ == "__main__":
    print(measure(Task.from_json(sys.argv[1])).to_json())
