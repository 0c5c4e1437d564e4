"""What it costs to draw with another set of LoRAs than the call before."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Annotated

import typer

from engines.cli import CacheOption, LoraOption, parse_loras
from engines.drawing import Drawing
from engines.order import DEFAULT_CACHE_DIR, Order
from engines.runner import Runner

SHIPPED = ["lcm=demo-lcm-lora", "striped=demo-striped-lora"]


def switch(
    model: Annotated[str, typer.Option(help="A checkpoint that the LoRAs fit.")] = "demo-base",
    lora: LoraOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Switches to each set.")] = 10,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
) -> None:
    """Milliseconds from one LoRA set to the next and back to none, beside one denoise call's."""
    paths, _ = parse_loras(lora or SHIPPED)
    typer.echo("| engine | to the set | switch, ms | denoise call, ms |")
    typer.echo("| --- | --- | --- | --- |")
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
            typer.echo(f"| {backend} | {name} | {switch_ms:.1f} | {call_ms:.1f} |")
        runner.close()


def _denoise_ms(runner: Runner, drawing: Drawing) -> float:
    begun = time.perf_counter()
    runner.denoise([drawing])
    return (time.perf_counter() - begun) * 1e3
