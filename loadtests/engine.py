"""`engine`: what the bare engines do here, over backend, precision, batch, size and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from tqdm import tqdm

from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests.bare import SECONDS, Point, Task, measure
from loadtests.plots import lines, name_axes, panels, whole_numbers
from loadtests.report import RESULTS, OutOption, Report

HEADER = (
    "engine", "precision", "batch", "size, px", "steps", "images/s", "step, ms", "decode, ms",
    "memory, MiB", "GFLOP a step", "GFLOP/s", "of the matrix peak",
)  # fmt: skip


def engine(
    kind: Annotated[
        list[str] | None,
        typer.Option(help="BACKEND:PRECISION, as onnxruntime:fp32; repeat."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, max=63, help="Repeat.")] = None,
    size: Annotated[list[int] | None, typer.Option(min=64, max=2048, help="Repeat.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, max=50, help="Repeat.")] = None,
    model: Annotated[str, typer.Option(help="As of `fourstep serve`.")] = "demo-lcm",
    num_threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")] = 0,
    seconds: Annotated[float, typer.Option(min=0.05, help="Of each measurement.")] = SECONDS,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Images/s, call times, memory and FLOP/s of the bare engines on this machine."""
    points: list[Point] = []
    tasks = [
        _task(each, model, cache_dir, batch, size, steps, num_threads, seconds)
        for each in kind or _default_kinds()
    ]
    for task in tqdm(tasks, desc="engines", unit="engine"):
        points += measure(task)
    report = Report("engine", f"Bare engines, {Path(model).name}")
    report.data["points"] = [point._asdict() for point in points]
    report.table(HEADER, [_row(point) for point in points])
    report.text(
        "The matrix peak is what `torch.mm` of two large square matrices reaches here in the same "
        f"precision: {_peaks(points)}. FLOP are counted from the exported graph: products and "
        "convolutions, a multiply-add as two."
    )
    text = "Images per second and time of a denoise call against the batch size"
    report.figure("batching", _batching_plot(points), text)
    report.write(out)


def _default_kinds() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return ["torch:fp32", "torch:fp16", "torch:bf16"]
    return ["onnxruntime:fp32", "torch:fp32", "torch:bf16"]


def _task(
    kind: str, model: str, cache_dir: Path, batch: list[int] | None, size: list[int] | None,
    steps: list[int] | None, num_threads: int, seconds: float,
) -> Task:  # fmt: skip
    backend, colon, precision = kind.partition(":")
    if not colon or precision not in ("fp32", "fp16", "bf16"):
        raise typer.BadParameter(f"--kind is {kind!r}; write BACKEND:PRECISION, as torch:bf16")
    return Task(
        model, backend, precision, cache_dir, tuple(batch or (1, 2, 4, 8)),
        tuple(size or (128, 192)), tuple(steps or (1, 4)), num_threads, seconds,
    )  # fmt: skip


def _row(point: Point) -> list[object]:
    return [
        point.backend, point.precision, point.batch, point.size_px, point.num_steps,
        f"{point.images_per_s:.2f}", f"{point.step_ms:.1f}", f"{point.decode_ms:.1f}",
        f"{point.memory_mib:.0f}", f"{point.step_flops / 1e9:.2f}",
        f"{point.flops_per_s / 1e9:.0f}", f"{point.flops_per_s / point.peak_flops_per_s:.0%}",
    ]  # fmt: skip


def _peaks(points: list[Point]) -> str:
    found = {point.precision: point.peak_flops_per_s for point in points}
    return ", ".join(f"{value / 1e9:.0f} GFLOP/s in {name}" for name, value in found.items())


def _batching_plot(points: list[Point]) -> Figure:
    """The first size and the most steps, by engine."""
    size_px, num_steps = points[0].size_px, max(point.num_steps for point in points)
    by_engine: dict[str, list[Point]] = {}
    for point in points:
        if (point.size_px, point.num_steps) == (size_px, num_steps):
            by_engine.setdefault(f"{point.backend} {point.precision}", []).append(point)
    figure, (left, right) = panels(2)
    batches = {name: [p.batch for p in found] for name, found in by_engine.items()}
    rates = {name: [p.images_per_s for p in found] for name, found in by_engine.items()}
    times = {name: [p.step_ms for p in found] for name, found in by_engine.items()}
    lines(left, {name: (batches[name], rates[name]) for name in by_engine}, room=0.3)
    name_axes(left, f"{size_px} px, {num_steps} steps", "rows in the batch", "images/s")
    whole_numbers(left)
    lines(right, {name: (batches[name], times[name]) for name in by_engine}, room=0.3)
    name_axes(right, "One denoise call", "rows in the batch", "ms")
    whole_numbers(right)
    return figure
