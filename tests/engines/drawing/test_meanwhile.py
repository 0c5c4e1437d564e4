"""torch draws while what was ordered is built, by real engines and a real build."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.drawing.meanwhile import CHILD, _dump, _load
from engines.drawing.model import must_be_built
from engines.drawing.runner import Runner
from engines.facts import Defaults
from engines.order import Order
from tests.engines.peers import draw_together, psnr_db, recipe

BUILD_S = 600.0  # a build of the tiny model takes seconds, on a machine that is busy minutes


@pytest.fixture
def order(checkpoints: Path, fresh_cache: Path) -> Order:
    """Of ONNX Runtime, with nothing built yet."""
    return Order(
        str(checkpoints / "tiny-lcm"),
        backend="onnxruntime",
        cache_dir=fresh_cache,
        num_threads=1,
        serve_meanwhile=True,
    )


@pytest.fixture
def runner(order: Order) -> Iterator[Runner]:
    runner = Runner.open(order)
    yield runner
    runner.close()


def test_rows_in_flight_go_on_by_the_engine_that_was_built(runner: Runner, order: Order) -> None:
    assert (runner.info.backend, runner.info.backend_reason) == (
        "torch", "until onnxruntime is built",
    )  # fmt: skip
    wanted = recipe(guidance_scale=8.5)
    (by_torch,) = draw_together(runner, [wanted])
    row = runner.start(wanted)
    runner.encode_text([row])
    runner.denoise([row])
    runner.denoise([row])
    assert runner.info.backend == "torch"
    assert runner._build is not None
    assert runner._build.join(BUILD_S)
    runner.denoise([row])
    assert (runner.info.backend, runner.info.backend_reason) == ("onnxruntime", "asked for")
    runner.denoise([row])
    runner.decode([row])
    assert row.pixels is not None
    assert psnr_db(row.pixels, by_torch.pixels) >= 50
    assert not must_be_built(order)
    again = Runner.open(order)  # there is nothing left to build
    assert again.info.backend == "onnxruntime"
    again.close()


def test_the_building_process_gets_the_order_whole(order: Order) -> None:
    full = dataclasses.replace(
        order,
        loras={"ink": "/ink.safetensors"},
        unet="/unet",
        defaults=Defaults("lcm", 2, 1.5, (999, 499)),
    )
    assert _load(_dump(full)) == full


def test_a_build_that_fails_leaves_torch(order: Order, tmp_path: Path) -> None:
    no_folder = tmp_path / "file"
    no_folder.write_text("a file, where a folder should be")
    runner = Runner.open(dataclasses.replace(order, cache_dir=no_folder))
    assert runner._build is not None
    assert runner._build.join(BUILD_S)
    draw_together(runner, [recipe()])
    assert runner.info.backend == "torch"
    assert "ended with code 1" in runner.info.backend_reason
    runner.close()


def test_no_build_outlives_its_runner(runner: Runner, order: Order) -> None:
    runner.close()
    assert runner._build is not None
    assert runner._build.join(0)
    assert must_be_built(order)


def test_no_build_outlives_a_process_that_was_killed(order: Order) -> None:
    """Its end closes the pipe, whatever ended it."""
    with subprocess.Popen(CHILD, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(_dump(order))
        child.stdin.close()
        assert child.wait(BUILD_S) == 1
    assert must_be_built(order)
