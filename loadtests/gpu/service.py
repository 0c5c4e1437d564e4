"""The whole service through HTTP, by its own ASGI application: a bare machine has no Ray.

One replica under uvicorn, and the bare engine of the same model in this process, in turns with it.
What Ray Serve and HAProxy add is for `overhead` to say, where they are installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from engines.drawing.runner import Runner
from engines.order import Order
from loadtests.bare import recipes_of
from loadtests.client import Answer, Client, require_answers
from loadtests.gpu.models import SD15, save_checkpoint
from loadtests.gpu.section import Section
from loadtests.scrape import Scrape
from loadtests.serving import Service, running
from loadtests.traffic import Ask, Profile
from service.ray_serve.environment import free_port
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app

NUM_STEPS = 4
FORMATS = ("png", "jpeg", "webp")
CLIENTS = {"cuda": 32, "cpu": 2}
MAX_BATCH = {"cuda": 8, "cpu": 2}
BATCHES = {"cuda": 12, "cpu": 2}  # full ones of the bare engine, a round
ALONE = {"cuda": 30, "cpu": 2}  # images of one client after the other
SLACK = 1.3  # of a round, for what HTTP adds to the bare engine's time
OF_A_START = ("bundle_build", "load")
IMPORTS = (
    "engines.backends.torch_engine",
    "diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img",
)


def app() -> FastAPI:
    """What uvicorn serves (``--factory``); its settings come from the environment.

    What loading would import is imported before, so that the service's own figure is loading alone.
    """
    for name in IMPORTS:
        importlib.import_module(name)
    return build_app(Replica(load_settings()))


def measure(section: Section) -> None:
    """A start, one client and saturation beside the bare engine; another start if time is left."""
    with tempfile.TemporaryDirectory() as name, section.attempt("service"):
        folder = Path(name)
        model, size_px = _model(folder, section.device)
        begun = time.perf_counter()
        kernels = Path(os.environ.get("TRITON_CACHE_DIR", folder / "kernels"))
        first = "first, kernels " + ("kept from before" if kernels.exists() else "to be compiled")
        with _started(section, model, folder, size_px, first) as service:
            start_s = time.perf_counter() - begun
            with section.attempt("the bare engine beside it"):
                _beside_bare(section, service, model, folder, size_px)
        if section.has_time("another start", start_s):
            with _started(section, model, folder, size_px, "again"):
                pass


def _beside_bare(
    section: Section, service: Service, model: str, folder: Path, size_px: int
) -> None:
    rows = MAX_BATCH[section.device]
    bare = Runner.open(Order(model, "torch", cache_dir=folder, max_batch=rows))
    try:
        bare.warm_up()
        _alone(section, service, bare, size_px)
        recipes = recipes_of(bare, rows, size_px, NUM_STEPS)
        round_s = _batches(section.device) * _seconds(functools.partial(bare.draw, recipes))
        for encoding in FORMATS:
            what = f"saturation, {encoding}"
            if section.has_time(what, SLACK * round_s):
                with section.attempt(what):
                    _saturation(section, service, bare, encoding, size_px)
    finally:
        bare.close()


def _batches(device: str) -> float:
    """Full ones of a format's round: the bare engine's, and as many through HTTP with its ends."""
    return 2 * BATCHES[device] + 2 * CLIENTS[device] / MAX_BATCH[device]


@contextlib.contextmanager
def _started(
    section: Section, model: str, folder: Path, size_px: int, start: str
) -> Iterator[Service]:
    """The service, with what its start and its first image took, and what it says itself of that.

    What is neither building nor loading is the interpreter's start and imports.
    """
    begun = time.perf_counter()
    with _service(section, model, folder) as service:
        ready_s = time.perf_counter() - begun
        _draw(service, "png", 1, 1, size_px)
        first_s = time.perf_counter() - begun
        scrape = Scrape.of(service.url)
        build_s, load_s = (scrape.gauge(f"fourstep_{what}_seconds") for what in OF_A_START)
        section.row(
            "start", start=start, ready_s=ready_s, first_image_s=first_s,
            imports_s=ready_s - build_s - load_s, build_s=build_s, load_s=load_s,
        )  # fmt: skip
        yield service


def _model(folder: Path, device: str) -> tuple[str, int]:
    """A random checkpoint of SD 1.5's architecture; on a CPU the shipped model."""
    if device == "cpu":
        return "demo-lcm", 128
    checkpoint = folder / "sd15-lcm-random"
    save_checkpoint(SD15, device, checkpoint)
    torch.cuda.empty_cache()
    return str(checkpoint), SD15.size_px


@contextlib.contextmanager
def _service(section: Section, model: str, folder: Path) -> Iterator[Service]:
    port, device = free_port(), section.device
    command = [sys.executable, "-m", "uvicorn", "--factory", "loadtests.gpu.service:app"]
    command += ["--port", str(port), "--log-level", "warning"]
    environment = {
        "FOURSTEP_MODEL": model, "FOURSTEP_ENGINE": "torch", "FOURSTEP_CACHE_DIR": str(folder),
        "FOURSTEP_MAX_BATCH": str(MAX_BATCH[device]),
        "FOURSTEP_MAX_WAITING": str(8 * CLIENTS[device]),
    }  # fmt: skip
    with running(command, port, "/readyz", environment, timeout_s=section.seconds_left) as service:
        yield service


def _draw(service: Service, encoding: str, count: int, clients: int, size_px: int) -> list[Answer]:
    """So many images, asked for by clients of whom each waits for its answer."""

    def body(ask: Ask) -> dict[str, Any]:
        return ask.body() | {"output_format": encoding}

    client = Client(service.url, body=body, accept=f"image/{encoding}")
    asks = Profile("uniform", (NUM_STEPS,), (size_px,)).asks(count, seed=count)
    answers = client.closed_loop(asks, clients)
    require_answers(answers, "the service")
    return answers


def _alone(section: Section, service: Service, bare: Runner, size_px: int) -> None:
    count = ALONE[section.device]
    answers = _draw(service, "png", count, 1, size_px)
    (recipe,) = recipes_of(bare, 1, size_px, NUM_STEPS)
    found = sorted(_seconds(functools.partial(bare.draw, [recipe])) for _ in range(count))
    section.row(
        "one client", encoding="png", p50_ms=1e3 * statistics.median(a.latency_s for a in answers),
        bare_engine_ms=1e3 * found[count // 2],
    )  # fmt: skip
    stages = {
        name: statistics.median(a.timings[name] for a in answers) for name in answers[0].timings
    }
    section.row("one client, ms by Server-Timing", encoding="png", **stages)


def _saturation(
    section: Section, service: Service, bare: Runner, encoding: str, size_px: int
) -> None:
    """Images/s, without the first answers, which came at once, and the last, whom none follows."""
    clients, rows = CLIENTS[section.device], bare.info.max_batch
    count = BATCHES[section.device] * rows
    recipes = recipes_of(bare, rows, size_px, NUM_STEPS)
    seconds = sum(_seconds(functools.partial(bare.draw, recipes)) for _ in range(count // rows))
    answers = _draw(service, encoding, count + 2 * clients, clients, size_px)
    done_s = sorted(answer.done_s for answer in answers)
    rate = count / (done_s[count + clients - 1] - done_s[clients - 1])
    section.row(
        "saturation", encoding=encoding, clients=clients, http_images_per_s=rate,
        bare_images_per_s=count / seconds, http_share=rate * seconds / count,
        p50_ms=1e3 * statistics.median(a.latency_s for a in answers),
    )  # fmt: skip


def _seconds(call: functools.partial[Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
