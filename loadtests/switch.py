"""What it costs to draw with another set of LoRAs than the call before."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Annotated

import typer

from engines.drawing.drawing import Drawing
from engines.drawing.runner import Runner
from engines.options import CacheOption, LoraOption, parse_loras
from engines.order import DEFAULT_CACHE_DIR, Order
from loadtests.plots import name_axes, panels, stacked
from loadtests.report import RESULTS, OutOption, Report

SHIPPED = ["lcm=demo-lcm-lora", "striped=demo-striped-lora"]


def switch(
    model: Annotated[str, typer.Option(help="A checkpoint that the LoRAs fit.")] = "demo-base",
    lora: LoraOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Switches to each set.")] = 10,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Milliseconds from one LoRA set to the next and back to none, beside one denoise call's."""
    paths, _ = parse_loras(lora or SHIPPED)
    rows: list[tuple[str, str, float, float]] = []
    sets = [{name: 1.0} for name in paths] + [dict.fromkeys(paths, 1.0), {}]
    for backend in ("onnxruntime", "torch"):
        order = Order(model, backend, cache_dir=cache_dir, loras=paths)
        runner = Runner.open(order)
        recipe = runner.default_recipe(0, num_steps=2 * rounds + 1)
        for index, chosen in enumerate(sets):
            drawing, other = (
                runner.start(dataclasses.replace(recipe, loras=loras))
                for loras in (chosen, sets[index - 1])
            )
            runner.encode_text([drawing, other])
            switched, alike = [], []
            for _ in range(rounds):
                runner.denoise([other])
                switched.append(_denoise_ms(runner, drawing))
                alike.append(_denoise_ms(runner, drawing))
            call_ms = statistics.median(alike)
            switch_ms = statistics.median(switched) - call_ms
            name = " + ".join(chosen) or "none"
            rows.append((backend, name, round(switch_ms, 2), round(call_ms, 2)))
        runner.close()
    report = Report("switch", "What another set of LoRAs costs")
    report.data["rows"] = rows
    report.table(["engine", "to the set", "switch, ms", "denoise call, ms"], rows)
    figure, (panel,) = panels(height=1.2 + 0.4 * len(rows), width=7)
    parts = {
        "denoise call": [call_ms for *_, call_ms in rows],
        "switch before it": [switch_ms for *_, switch_ms, _ in rows],
    }
    stacked(panel, [f"{row[0]}: {row[1]}" for row in rows], parts)
    name_axes(panel, "A denoise call with a set that was not loaded", "ms", "")
    report.figure("cost", figure, "Milliseconds of a switch and of a denoise call, by set")
    report.write(out)


def _denoise_ms(runner: Runner, drawing: Drawing) -> float:
    begun = time.perf_counter()
    runner.denoise([drawing])
    return (time.perf_counter() - begun) * 1e3
