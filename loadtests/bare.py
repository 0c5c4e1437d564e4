"""One engine without a service: how long its calls take, in a process of its own.

Each backend and precision gets a fresh process, so that its memory is its own.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from engines.drawing.runner import Runner
    from engines.families.recipe import Recipe

SECONDS = 0.6  # of each measurement, and at least five calls
MIB = 2**20


class Point(NamedTuple):
    """One line of the engine table."""

    backend: str
    precision: str
    batch: int
    size_px: int
    num_steps: int
    images_per_s: float
    step_ms: float  # one denoise call of the batch
    decode_ms: float  # one decode call of the batch
    memory_mib: float  # the process's peak, or the GPU's
    step_flops: int
    peak_flops_per_s: float
    served_batch: int  # lanes of a denoise call when the service runs this engine
    served_decode_batch: int  # rows of a decode call

    @property
    def flops_per_s(self) -> float:
        return self.step_flops / (self.step_ms / 1e3)


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process measures."""

    model: str
    backend: str
    precision: str
    cache_dir: Path
    batches: tuple[int, ...]
    sizes_px: tuple[int, ...]
    steps: tuple[int, ...]
    num_threads: int
    seconds: float = SECONDS


def measure(task: Task) -> list[Point]:
    """All points of a task, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, task).result()


def _measure(task: Task) -> list[Point]:
    import torch

    from engines.drawing.batching import decode_rows, denoise_rows
    from engines.drawing.runner import Runner
    from engines.order import Order
    from loadtests.peak import matrix_peak, plain_fp32

    plain_fp32()
    if task.num_threads:
        torch.set_num_threads(task.num_threads)
    order = Order(
        task.model, task.backend, task.precision, task.cache_dir,
        num_threads=task.num_threads or None, max_batch=max(task.batches),
    )  # fmt: skip
    runner = Runner.open(order)
    step_flops = _step_flops(task)
    peak = matrix_peak(runner.info.precision, _device())
    served = denoise_rows(_device(), runner.info.default_width)
    decoded = decode_rows(_device(), runner.info.default_width, served)
    points = []
    for size_px in task.sizes_px:
        for batch in task.batches:
            step_ms, decode_ms = call_times(runner, batch, size_px, task.seconds)
            flops = step_flops(batch, size_px)
            for num_steps in task.steps:
                recipes = recipes_of(runner, batch, size_px, num_steps)
                seconds = _median_s(lambda: runner.draw(recipes), task.seconds)  # noqa: B023
                points.append(
                    Point(
                        task.backend, runner.info.precision, batch, size_px, num_steps,
                        batch / seconds, step_ms, decode_ms, _memory_mib(), flops, peak, served,
                        decoded,
                    )
                )  # fmt: skip
    return points


def _step_flops(task: Task) -> Callable[[int, int], int]:
    """A count of one denoise call by batch and size: torch's own, or of the graph that runs."""
    from engines.build.checkpoint import load_facts, load_pipeline, pipeline_class
    from engines.build.source import resolve
    from engines.drawing.model import prepare
    from engines.families import family_of
    from engines.order import Order
    from loadtests.flops import count_flops
    from loadtests.torch_flops import count_part_flops

    def sizes(batch: int, side: int) -> dict[str, int]:
        return {"batch": batch, "rows": side, "columns": side}

    if task.backend == "torch" and (folder := resolve(task.model)):
        pipeline = load_pipeline(folder, task.precision)
        facts = load_facts(folder, pipeline)
        parts = family_of(pipeline_class(folder)).parts(pipeline, facts)
        (denoiser,) = (part for part in parts if part.name == "denoiser")
        scale = facts.vae_scale_factor
        return lambda batch, size_px: count_part_flops(denoiser, sizes(batch, size_px // scale))
    bundle = prepare(Order(task.model, "onnxruntime", cache_dir=task.cache_dir), _no_progress)
    graph, scale = bundle.part("denoiser"), bundle.facts.vae_scale_factor
    return lambda batch, size_px: count_flops(graph, sizes(batch, size_px // scale))


def recipes_of(runner: Runner, batch: int, size_px: int, num_steps: int) -> list[Recipe]:
    plain = (runner.default_recipe(seed, num_steps=num_steps) for seed in range(batch))
    return [dataclasses.replace(each, width_px=size_px, height_px=size_px) for each in plain]


def call_times(runner: Runner, batch: int, size_px: int, seconds: float) -> tuple[float, float]:
    """Milliseconds of a denoise call and of a decode call."""
    rows = [runner.start(recipe) for recipe in recipes_of(runner, batch, size_px, 50)]
    runner.encode_text(rows)

    def step() -> None:
        if rows[0].step_index == rows[0].num_steps:
            for row in rows:
                row.step_index = 0
        runner.denoise(rows)

    def decode() -> None:
        for row in rows:
            row.step_index = row.num_steps - 1  # not its end: a preview, so its latents stay
            row.previews.clear()
        runner.decode(rows)

    step_s, decode_s = (_median_s(call, seconds) for call in (step, decode))
    return 1e3 * step_s, 1e3 * decode_s


def _median_s(call: Callable[[], object], seconds: float) -> float:
    call()
    _wait_for_gpu()
    found: list[float] = []
    while len(found) < 5 or sum(found) < seconds:
        begun = time.perf_counter()
        call()
        _wait_for_gpu()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def _wait_for_gpu() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory_mib() -> float:
    import torch

    if torch.cuda.is_initialized():
        return (torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def _no_progress(what: str, done: int, total: int) -> None:
    pass
