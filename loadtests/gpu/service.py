"""The whole service through HTTP, by its own ASGI application: a bare machine has no Ray.

One replica under uvicorn, and the bare engine of the same model in this process, in turns with it.
What Ray Serve and HAProxy add is for `overhead` to say, where they are installed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from engines.order import Order
from engines.runner import Runner
from loadtests.bare import recipes_of
from loadtests.client import Client, require_answers
from loadtests.gpu.models import SD15, save_checkpoint
from loadtests.gpu.section import Section
from loadtests.serving import Service, running
from loadtests.traffic import Ask, Profile
from service.app import build_app
from service.ray_environment import free_port
from service.replica import Replica
from service.settings import load_settings

NUM_STEPS = 4
FORMATS = ("png", "jpeg", "webp")
CLIENTS = {"cuda": 32, "cpu": 2}
MAX_BATCH = {"cuda": 8, "cpu": 2}
BATCHES = {"cuda": 12, "cpu": 2}  # full ones of the bare engine, a round
ALONE = {"cuda": 30, "cpu": 2}  # images of one client after the other
ROUND_S = {"cuda": 12.0, "cpu": 2.0}  # a format's, about


def app() -> FastAPI:
    """What uvicorn serves (``--factory``); its settings come from the environment."""
    return build_app(Replica(load_settings()))


def measure(section: Section) -> None:
    """Start, one client, saturation in each format beside the bare engine."""
    device = section.device
    with tempfile.TemporaryDirectory() as folder, section.attempt("service"):
        model, size_px = _model(Path(folder), device)
        with _started(section, model, Path(folder), size_px, "first, kernels to be compiled"):
            pass
        with _started(section, model, Path(folder), size_px, "again") as service:
            bare = Runner.open(Order(model, "torch", max_batch=MAX_BATCH[device]))
            bare.warm_up()
            _alone(section, service, bare, size_px)
            for encoding in FORMATS:
                if section.has_time(f"saturation, {encoding}", ROUND_S[device]):
                    with section.attempt(f"saturation, {encoding}"):
                        _saturation(section, service, bare, encoding, size_px)
            bare.close()


@contextlib.contextmanager
def _started(
    section: Section, model: str, folder: Path, size_px: int, start: str
) -> Iterator[Service]:
    """The service, with what its start and its first image took."""
    begun = time.perf_counter()
    with _service(model, section.device, folder) as service:
        ready_s = time.perf_counter() - begun
        _draw(service, "png", 1, 1, size_px)
        first_s = time.perf_counter() - begun
        section.row("start", start=start, ready_s=ready_s, first_image_s=first_s)
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
def _service(model: str, device: str, folder: Path) -> Iterator[Service]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "loadtests.gpu.service:app"]
    command += ["--port", str(port), "--log-level", "warning"]
    environment = {
        "FOURSTEP_MODEL": model, "FOURSTEP_ENGINE": "torch", "FOURSTEP_CACHE_DIR": str(folder),
        "FOURSTEP_MAX_BATCH": str(MAX_BATCH[device]),
        "FOURSTEP_MAX_WAITING": str(8 * CLIENTS[device]),
    }  # fmt: skip
    with running(command, port, "/readyz", environment) as service:
        yield service


def _draw(
    service: Service, encoding: str, count: int, clients: int, size_px: int
) -> tuple[list[float], list[float]]:
    """Latencies and times of completion of so many images, in seconds."""

    def body(ask: Ask) -> dict[str, Any]:
        return ask.body() | {"output_format": encoding}

    client = Client(service.url, body=body, accept=f"image/{encoding}")
    asks = Profile("uniform", (NUM_STEPS,), (size_px,)).asks(count, seed=count)
    answers = client.closed_loop(asks, clients)
    require_answers(answers, "the service")
    return sorted(a.latency_s for a in answers), sorted(a.done_s for a in answers)


def _alone(section: Section, service: Service, bare: Runner, size_px: int) -> None:
    count = ALONE[section.device]
    latencies, _ = _draw(service, "png", count, 1, size_px)
    (recipe,) = recipes_of(bare, 1, size_px, NUM_STEPS)
    found = sorted(_seconds(functools.partial(bare.draw, [recipe])) for _ in range(count))
    section.row(
        "one client", encoding="png", p50_ms=1e3 * latencies[count // 2],
        bare_engine_ms=1e3 * found[count // 2],
    )  # fmt: skip


def _saturation(
    section: Section, service: Service, bare: Runner, encoding: str, size_px: int
) -> None:
    """Images/s, without the first answers, which came at once, and the last, whom none follows."""
    clients, rows = CLIENTS[section.device], bare.info.max_batch
    count = BATCHES[section.device] * rows
    recipes = recipes_of(bare, rows, size_px, NUM_STEPS)
    seconds = sum(_seconds(functools.partial(bare.draw, recipes)) for _ in range(count // rows))
    latencies, done_s = _draw(service, encoding, count + 2 * clients, clients, size_px)
    rate = count / (done_s[count + clients - 1] - done_s[clients - 1])
    section.row(
        "saturation", encoding=encoding, clients=clients, http_images_per_s=rate,
        bare_images_per_s=count / seconds, http_share=rate * seconds / count,
        p50_ms=1e3 * latencies[len(latencies) // 2],
    )  # fmt: skip


def _seconds(call: functools.partial[Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
