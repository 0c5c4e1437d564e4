"""Where the time of a call goes: its kernels by the device's own record, and an image's calls.

What `speed` finds too slow is looked up here: a step of few rows is bound by many small kernels and
the gaps between them, one of many rows by a few large ones.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from engines.backends.torch_engine import TorchEngine
from engines.drawing.runner import Runner
from engines.drawing.stage import Stage
from loadtests.bare import recipes_of
from loadtests.gpu.clocks import device_ms, wait
from loadtests.gpu.models import Shape, open_runner, shape_for, with_tiny_decoder
from loadtests.gpu.section import Section
from loadtests.gpu.speed import NUM_STEPS, SECONDS, step_inputs
from loadtests.peak import plain_fp32

BATCHES = {"cuda": (1, 8), "cpu": (2,)}
RUNS = {"cuda": 10, "cpu": 2}  # under the profiler
IMAGES = {"cuda": 20, "cpu": 2}
MOST = 16  # kernels named in a table
NAME = 90  # characters of a kernel's name


def measure(section: Section) -> None:
    """Kernels of a step, of both decoders; then the calls of an image, of each of a batch."""
    plain_fp32()
    device, shape = section.device, shape_for(section.device)
    for each in (shape, with_tiny_decoder(shape)):
        with section.attempt(each.name):
            runner, engines = open_runner(each, device, TorchEngine, max(BATCHES[device]))
            latents = {"latents": torch.randn(1, 4, *2 * [each.side], device=device)}
            decoder = engines["vae_decoder"]
            if each is shape:
                for batch in BATCHES[device]:
                    step = step_inputs(batch, each, device)
                    record_kernels(
                        section, f"a step, batch {batch}", _run(engines["denoiser"], step)
                    )
            record_kernels(section, f"a decoding, {each.name}", _run(decoder, latents))
            for batch in BATCHES[device]:
                with section.attempt(f"calls, {each.name}, batch {batch}"):
                    section.row("calls of an image, ms", of=each.name, batch=batch,
                                **_calls(runner, batch, each, device))  # fmt: skip
            runner.close()
            del runner, engines, decoder


def _run(engine: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    return lambda: engine.run(inputs)


def record_kernels(section: Section, what: str, call: Callable[[], object]) -> None:
    """How long a call takes and its device is busy, and the `MOST` kernels that take the most."""
    device = section.device
    ms = device_ms(call, device, SECONDS[device])
    runs = RUNS[device]
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    with profile(activities=kinds) as found:
        for _ in range(runs):
            call()
        wait(device)
    microseconds: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for event in found.events():
        if event.device_type.name == device.upper():
            own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            microseconds[event.name[:NAME]] += own / runs
            counts[event.name[:NAME]] += 1
    busy = sum(microseconds.values())
    section.row(
        "calls of engines", call=what, ms=ms, busy_ms=busy / 1e3,
        kernels=sum(counts.values()) / runs,
    )  # fmt: skip
    for name in sorted(microseconds, key=microseconds.__getitem__, reverse=True)[:MOST]:
        section.row(
            f"kernels of {what}", kernel=name, times=counts[name] / runs, us=microseconds[name],
            share_of_busy=microseconds[name] / busy,
        )  # fmt: skip


def _calls(runner: Runner, batch: int, shape: Shape, device: str) -> dict[str, float]:
    """Median milliseconds of each call by the host's clock, one image after the other."""
    recipes = recipes_of(runner, batch, shape.size_px, NUM_STEPS)
    kinds = {
        Stage.ENCODE_TEXT: runner.encode_text, Stage.DENOISE: runner.denoise,
        Stage.DECODE: runner.decode,
    }  # fmt: skip
    found: dict[str, list[float]] = defaultdict(list)
    for turn in range(3 + IMAGES[device]):  # the first capture
        wait(device)
        begun = at = time.perf_counter()
        times: dict[str, float] = defaultdict(float)
        drawings = [runner.start(recipe) for recipe in recipes]
        times["start"] = time.perf_counter() - at
        while (stage := drawings[0].stage) is not Stage.DONE:
            at = time.perf_counter()
            first = drawings[0].step_index == 0
            rows = runner.info.max_decode_batch if stage is Stage.DECODE else batch
            waiting = [drawing for drawing in drawings if drawing.stage is stage]
            for index in range(0, batch, rows):
                kinds[stage](waiting[index : index + rows])
            name = "first_denoise" if stage is Stage.DENOISE and first else stage.name.lower()
            times[name] += time.perf_counter() - at
        times["all"] = time.perf_counter() - begun
        if turn >= 3:
            for name, seconds in times.items():
                found[name].append(1e3 * seconds)
    return {name: sorted(values)[len(values) // 2] for name, values in found.items()}
