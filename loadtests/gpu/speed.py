"""How fast the product's engine draws, beside engines that do one thing each, over the batch.

One row of the table is one batch size of one engine: a denoise step and a decoding by the device's
clock, what the host adds to a step (``host_ms``: the runner's wall time less that), and whole
images as a caller waits for them.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engines.backends.engine import Engine
from engines.backends.torch_engine import TorchEngine
from engines.drawing.runner import Runner
from engines.families.part import Part
from loadtests.bare import call_times, recipes_of
from loadtests.gpu import sdxl
from loadtests.gpu.clocks import device_ms, wait, wall_ms
from loadtests.gpu.models import (
    Counts,
    Shape,
    count_shape,
    open_runner,
    shape_for,
    with_tiny_decoder,
)
from loadtests.gpu.plain import PlainEngine
from loadtests.gpu.section import Section
from loadtests.peak import matrix_peak, plain_fp32

NUM_STEPS = 4
BATCHES = {"cuda": (1, 2, 4, 8, 16, 32), "cpu": (1, 2)}
FEW = {"cuda": (1, 8), "cpu": (2,)}  # of the baselines
SECONDS = {"cuda": 0.3, "cpu": 0.02}  # of one measurement
BASELINES: dict[str, dict[str, Any]] = {
    "eager, NCHW": {},
    "eager, channels-last": {"channels_last": True},
    "CUDA graphs, channels-last": {"channels_last": True, "graphs": True},
}
# Seconds that each needs on an H100 at least: estimates, until the first page is there.
POINT_S, ENGINE_S, COMPILED_S, SDXL_S = 2.0, 6.0, 100.0, 20.0
MIB = 2**20
MakeEngine = Callable[[Part, str], Engine]


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What a row is held against."""

    shape: Shape
    counts: Counts
    peak: float  # FLOP/s of a matrix product in the same precision

    @classmethod
    def of(cls, shape: Shape, device: str) -> Yardstick:
        side = None if device == "cuda" else 256
        return cls(shape, count_shape(shape), matrix_peak(shape.precision, device, side))


def measure(section: Section) -> None:
    """The product first and at every batch; then what it is compared with, as far as time goes."""
    plain_fp32()
    device = section.device
    yardstick = Yardstick.of(shape_for(device), device)
    for what, flops in yardstick.counts._asdict().items():
        section.row("work of a row", part=what, gflop=flops / 1e9)
    points(section, "product", TorchEngine, yardstick, BATCHES[device])
    tiny = Yardstick.of(with_tiny_decoder(yardstick.shape), device)
    points(section, "product, tiny decoder", TorchEngine, tiny, FEW[device])
    if section.has_time("SDXL's UNet", SDXL_S if device == "cuda" else 0):
        sdxl.measure(section)
    for name, options in BASELINES.items():
        points(section, name, functools.partial(PlainEngine, **options), yardstick, FEW[device])
    cudnn_choice(section, yardstick)
    if section.has_time("compiled", COMPILED_S if device == "cuda" else 0):
        compiled = functools.partial(PlainEngine, channels_last=True, compiled=True)
        points(section, "compiled, channels-last", compiled, yardstick, FEW[device][-1:])


def points(
    section: Section, name: str, engine: MakeEngine, yardstick: Yardstick, batches: Sequence[int]
) -> None:
    """One engine at several batch sizes."""
    device = section.device
    if not section.has_time(name, ENGINE_S if device == "cuda" else 0):
        return
    with section.attempt(name):
        runner, engines = open_runner(yardstick.shape, device, engine, max(batches))
        for batch in batches:
            what = f"{name}, batch {batch}"
            if not section.has_time(what, POINT_S if device == "cuda" else 0):
                break
            with section.attempt(what):
                found = _point(runner, engines, batch, yardstick, device)
                section.row(yardstick.shape.name, engine=name, batch=batch, **found)
        runner.close()
        del runner, engines


def _point(
    runner: Runner, engines: Mapping[str, Engine], batch: int, yardstick: Yardstick, device: str
) -> dict[str, object]:
    counts, peak, seconds = yardstick.counts, yardstick.peak, SECONDS[device]
    forget_peak_memory(device)
    recipes = recipes_of(runner, batch, yardstick.shape.size_px, NUM_STEPS)
    begun = time.perf_counter()
    runner.draw(recipes)
    first_s = time.perf_counter() - begun
    images_ms = wall_ms(lambda: runner.draw(recipes), device, seconds, 3)
    step_ms, _ = call_times(runner, batch, yardstick.shape.size_px, seconds)
    step = step_inputs(batch, yardstick.shape, device)
    step_device_ms = device_ms(lambda: engines["denoiser"].run(step), device, seconds)
    rows = min(batch, runner.info.max_decode_batch)
    latents = {"latents": torch.randn(rows, 4, *2 * [yardstick.shape.side], device=device)}
    decode_ms = device_ms(lambda: engines["vae_decoder"].run(latents), device, seconds)

    def share(flops: float, ms: float) -> float:
        return flops / (ms / 1e3) / peak

    return {
        "step_ms": step_device_ms,
        "step_share": share(batch * counts.step, step_device_ms),
        "host_ms": step_ms - step_device_ms,
        "decode_rows": rows,
        "decode_ms": decode_ms,
        "decode_share": share(rows * counts.decode, decode_ms),
        "images_ms": images_ms,
        "images/s": 1e3 * batch / images_ms,
        "TFLOP/s": batch * counts.image(NUM_STEPS) / images_ms / 1e9,
        "images_share": share(batch * counts.image(NUM_STEPS), images_ms),
        "first_s": first_s,
        "memory_mib": peak_memory_mib(device),
    }


def cudnn_choice(section: Section, yardstick: Yardstick) -> None:
    """What it is worth to let cuDNN time its algorithms, and what that costs at the start."""
    device = section.device
    for chooses in (False, True):
        what = f"cudnn.benchmark={chooses}"
        if not section.has_time(what, ENGINE_S if device == "cuda" else 0):
            return
        with section.attempt(what):
            before = torch.backends.cudnn.benchmark
            size_px = yardstick.shape.size_px
            runner, _ = open_runner(yardstick.shape, device, TorchEngine, max(FEW[device]))
            torch.backends.cudnn.benchmark = chooses  # after the engine, which may set it
            try:
                for batch in FEW[device]:
                    recipes = recipes_of(runner, batch, size_px, NUM_STEPS)
                    begun = time.perf_counter()
                    for _ in range(3):  # an engine may capture at a second or third run
                        runner.draw(recipes)
                    warm_s = time.perf_counter() - begun
                    step_ms, decode_ms = call_times(runner, batch, size_px, SECONDS[device])
                    section.row(
                        "cudnn.benchmark", chooses=chooses, batch=batch, warm_up_s=warm_s,
                        step_ms=step_ms, decode_ms=decode_ms,
                    )  # fmt: skip
            finally:
                torch.backends.cudnn.benchmark = before
                runner.close()


def step_inputs(batch: int, shape: Shape, device: str) -> dict[str, Tensor]:
    """What `engines.families.stable_diffusion.Denoiser` takes, random, on the device."""
    generator = torch.Generator().manual_seed(batch)

    def normal(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator).to(device)

    return {
        "sample": normal(batch, 4, shape.side, shape.side),
        "timestep": torch.linspace(999, 259, batch).to(device),
        "prompt_embeds": normal(batch, 77, shape.width),
        "coefficients": (torch.rand(batch, 7, generator=generator) + 0.1).to(device),
        "noise": normal(batch, 4, shape.side, shape.side),
        "previous": normal(batch, 4, shape.side, shape.side),
        "guidance": torch.ones(batch, device=device),
        "uncond_index": torch.arange(batch, device=device),
        "timestep_cond": normal(batch, 256),
    }


def forget_peak_memory(device: str) -> None:
    gc.collect()
    wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mib(device: str) -> float | None:
    """Of tensors, graphs' pools included; a CPU does not count them."""
    return torch.cuda.max_memory_allocated() / MIB if device == "cuda" else None
