"""A picture that is decoded in tiles: it stalls nobody, and is let go between two of them."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from engines.drawing.drawing import Drawing
from engines.drawing.runner import Runner
from engines.order import Order
from service.batching.loop import EngineLoop
from service.batching.request import Event, Finished, Preview, Request, Resolved, Row, Status
from service.batching.scheduler import Limits
from service.telemetry.metrics import Metrics

SIDE, NUM_TILES = 128, 9  # in tiles of 64 px


class Gate:
    """A runner that waits at every decode until let through, and notes whose rows it has."""

    def __init__(self, runner: Runner) -> None:
        self.encode_text, self.encode_image = runner.encode_text, runner.encode_image
        self._runner = runner
        self.passes = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.decodes: list[list[str]] = []  # prompts

    def denoise(self, drawings: Sequence[Drawing], before_run: Callable[[], None]) -> None:
        self._runner.denoise(drawings, before_run)

    def decode(self, drawings: Sequence[Drawing]) -> None:
        self.decodes.append([drawing.recipe.prompt for drawing in drawings])
        self.entered.release()
        self.passes.acquire()
        self._runner.decode(drawings)


@pytest.fixture(scope="module")
def runner(lcm_checkpoint: Path, cache_dir: Path) -> Runner:
    return Runner.open(
        Order(str(lcm_checkpoint), "onnxruntime", cache_dir=cache_dir, vae_tiling_px=64)
    )


@pytest.fixture
def gate(runner: Runner) -> Gate:
    return Gate(runner)


@pytest.fixture
def loop(gate: Gate) -> Iterator[EngineLoop]:
    loop = EngineLoop(gate, Limits(max_decode_batch=1), Metrics("test"))
    loop.start()
    yield loop
    gate.passes.release(1000)
    loop.close()


def request_of(
    loop: EngineLoop, runner: Runner, prompt: str, side: int, num_previews: int = 0
) -> tuple[Request, queue.Queue[Event]]:
    events: queue.Queue[Event] = queue.Queue()
    now = loop.clock()
    request = Request(prompt, now, now + 60, events.put)
    recipe = runner.default_recipe(1, prompt, num_steps=2)
    recipe = dataclasses.replace(recipe, width_px=side, height_px=side, num_previews=num_previews)
    request.rows = [Row(request, 0, runner.start(recipe))]
    return request, events


def all_of(events: queue.Queue[Event]) -> list[Event]:
    found = [events.get(timeout=60)]
    while not isinstance(found[-1], Resolved):
        found.append(events.get(timeout=60))
    return found


def test_one_that_is_done_sooner_waits_for_one_tile(
    loop: EngineLoop, gate: Gate, runner: Runner
) -> None:
    large, of_large = request_of(loop, runner, "large", SIDE)
    loop.submit(large)
    assert gate.entered.acquire(timeout=60)
    small, of_small = request_of(loop, runner, "small", 64)
    loop.submit(small)  # while the first tile is decoded
    gate.passes.release(1000)
    assert all(each.error is None for each in all_of(of_small) if isinstance(each, Resolved))
    finished, resolved = all_of(of_large)
    assert isinstance(finished, Finished)
    assert isinstance(resolved, Resolved)
    assert resolved.error is None
    assert sum(prompts == ["large"] for prompts in gate.decodes) == NUM_TILES
    # The small one has two steps to go, beside which there is a tile each.
    assert gate.decodes.index(["small"]) <= 4
    (alone,) = runner.draw([large.rows[0].drawing.recipe])
    assert np.array_equal(alone.pixels, finished.pixels)


def test_a_preview_is_sent_once_it_is_whole(loop: EngineLoop, gate: Gate, runner: Runner) -> None:
    gate.passes.release(1000)
    request, events = request_of(loop, runner, "large", SIDE, num_previews=1)
    loop.submit(request)
    preview, finished, _ = all_of(events)
    assert isinstance(preview, Preview)
    assert isinstance(finished, Finished)
    assert preview.pixels.shape == finished.pixels.shape == (SIDE, SIDE, 3)
    assert len(gate.decodes) == 2 * NUM_TILES


def test_a_cancelled_one_is_gone_before_its_next_tile(
    loop: EngineLoop, gate: Gate, runner: Runner
) -> None:
    request, events = request_of(loop, runner, "large", SIDE)
    loop.submit(request)
    assert gate.entered.acquire(timeout=60)
    gate.passes.release()
    assert gate.entered.acquire(timeout=60)  # in its second tile
    loop.cancel(request)
    gate.passes.release()
    (resolved,) = all_of(events)
    assert isinstance(resolved, Resolved)
    assert request.status is Status.CANCELLED
    assert len(gate.decodes) == 2
    other, of_other = request_of(loop, runner, "small", 64)
    gate.passes.release(1000)
    loop.submit(other)
    assert len(all_of(of_other)) == 2
    assert gate.decodes[2:] == [["small"]]
    assert not loop._ledger.open
