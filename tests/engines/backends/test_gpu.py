"""What only an NVIDIA GPU can show: `pytest -m gpu`. Skips name what the machine lacks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.backends.choice import Machine, choose_backend
from engines.bundle import Blueprint, build_bundle
from engines.drawing import Recipe
from engines.errors import BackendUnavailable, InvalidInput, OutOfMemory
from engines.order import Order
from engines.plan import MODULES, PlanTarget
from engines.runner import Runner
from tests.engines.checkpoints import make_lora
from tests.engines.peers import draw_together, psnr_db, recipe

pytestmark = pytest.mark.gpu
MIN_PSNR_DB = 35.0  # of fp16 plans against fp32 on torch
DEMO = "demo-lcm"


def _recipes(count: int) -> list[Recipe]:
    return [
        recipe(
            prompt="a large red star at the center on a yellow background", width_px=128,
            height_px=128, seed=seed, num_steps=1 + seed % 4, guidance_scale=3.0,
        )
        for seed in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Iterator[Runner]:
    """torch on this machine, in fp32."""
    runner = Runner.open(Order(DEMO, backend="torch", precision="fp32", max_batch=8))
    yield runner
    runner.close()


@pytest.fixture(scope="module", params=sorted(MODULES))
def runner(request: pytest.FixtureRequest, cache_dir: Path) -> Iterator[Runner]:
    """Plans of the demo model, built here and now in fp16."""
    try:
        choose_backend(request.param, Machine.here())
    except BackendUnavailable as error:
        pytest.skip(str(error))
    runner = Runner.open(
        Order(DEMO, backend=request.param, precision="fp16", max_batch=8, cache_dir=cache_dir)
    )
    yield runner
    runner.close()


def test_torch_on_the_gpu_is_the_reference(reference: Runner) -> None:
    halves = Runner.open(Order(DEMO, backend="torch", precision="fp16", max_batch=8))
    for ours, theirs in zip(
        draw_together(halves, _recipes(4)), draw_together(reference, _recipes(4)), strict=True
    ):
        assert psnr_db(ours.pixels, theirs.pixels) >= MIN_PSNR_DB
    halves.close()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_plans_agree_with_torch_at_every_bucket(
    count: int, runner: Runner, reference: Runner
) -> None:
    """3 and 5 rows are padded to 4 and 8; the second pass replays captured graphs."""
    theirs = draw_together(reference, _recipes(count))
    for _ in range(2):
        for ours, expected in zip(draw_together(runner, _recipes(count)), theirs, strict=True):
            assert psnr_db(ours.pixels, expected.pixels) >= MIN_PSNR_DB


def test_a_graph_draws_what_an_eager_run_draws(runner: Runner) -> None:
    first = draw_together(runner, _recipes(4))
    for again, expected in zip(draw_together(runner, _recipes(4)), first, strict=True):
        assert np.array_equal(again.pixels, expected.pixels)


def test_a_size_without_a_profile_is_refused_before_it_runs(runner: Runner) -> None:
    with pytest.raises(InvalidInput, match="built for 128x128"):
        runner.start(recipe(width_px=160, height_px=160))


def test_loras_are_refitted_and_taken_out_again(
    tmp_path: Path, cache_dir: Path, runner: Runner
) -> None:
    folder = Path("engines/demo") / DEMO
    lora = make_lora(folder, tmp_path / "ink", ["to_q", "to_v"])
    backend = runner.info.backend
    both = [
        Runner.open(Order(DEMO, backend=kind, precision=precision, max_batch=4, cache_dir=cache_dir,
                    loras={"ink": lora}))
        for kind, precision in ((backend, "fp16"), ("torch", "fp32"))
    ]  # fmt: skip
    plain, styled = _recipes(1), [recipe(width_px=128, height_px=128, loras={"ink": 1.0})]
    base = draw_together(both[0], plain)[0].pixels
    for wanted in (styled, plain, styled, plain):
        ours, theirs = (draw_together(each, wanted)[0].pixels for each in both)
        assert psnr_db(ours, theirs) >= MIN_PSNR_DB
    assert np.array_equal(draw_together(both[0], plain)[0].pixels, base)
    for each in both:
        each.close()


def test_two_engines_in_one_process(runner: Runner, cache_dir: Path, reference: Runner) -> None:
    other = Runner.open(
        Order(DEMO, backend=runner.info.backend, precision="fp16", max_batch=8, cache_dir=cache_dir)
    )
    wanted = _recipes(2)
    theirs = draw_together(reference, wanted)
    for each in (runner, other, runner):
        for ours, expected in zip(draw_together(each, wanted), theirs, strict=True):
            assert psnr_db(ours.pixels, expected.pixels) >= MIN_PSNR_DB
    other.close()


def test_memory_that_is_not_there_is_an_error_and_no_crash(runner: Runner, cache_dir: Path) -> None:
    """A fresh engine has no buffers yet for any shape; it makes them when there is room again."""
    backend = runner.info.backend
    fresh = Runner.open(
        Order(DEMO, backend=backend, precision="fp16", max_batch=8, cache_dir=cache_dir)
    )
    wanted = _recipes(8)
    rows = [fresh.start(each) for each in wanted]
    torch.cuda.empty_cache()
    hogs = []
    for size in (2**30, 2**24, 2**20, 2**16):  # to the last piece, whatever the fragments
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                hogs.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    with pytest.raises(OutOfMemory):
        fresh.encode_text(rows)
    hogs.clear()
    torch.cuda.empty_cache()
    for ours, theirs in zip(
        draw_together(fresh, wanted), draw_together(runner, wanted), strict=True
    ):
        assert psnr_db(ours.pixels, theirs.pixels) >= MIN_PSNR_DB
    fresh.close()


def test_one_lora_target_of_a_fused_group_can_be_refitted(
    tmp_path: Path, cache_dir: Path, runner: Runner
) -> None:
    """Where the builder has fused q, k and v, changing q alone takes the other two as well."""
    lora = make_lora(Path("engines/demo") / DEMO, tmp_path / "one", ["to_q"])
    wanted = [recipe(width_px=128, height_px=128, loras={"one": 1.0})]
    drawn = []
    for kind, precision in ((runner.info.backend, "fp16"), ("torch", "fp32")):
        order = Order(DEMO, backend=kind, precision=precision, max_batch=4, cache_dir=cache_dir,
                      loras={"one": lora})  # fmt: skip
        opened = Runner.open(order)
        drawn.append(draw_together(opened, wanted)[0].pixels)
        opened.close()
    assert psnr_db(*drawn) >= MIN_PSNR_DB


def test_a_stripped_plan_gets_its_weights_when_it_is_loaded(tmp_path: Path, runner: Runner) -> None:
    target = PlanTarget(runner.info.backend, ((128, 128),), 4, strip=True)
    bundle = build_bundle(
        Blueprint(Path("engines/demo") / DEMO, "fp16", Machine.here().aim(target)),
        tmp_path / "stripped",
        lambda what, done, total: None,
    )
    stripped = Runner.open(Order(str(bundle.folder), backend=runner.info.backend))
    assert stripped.info.max_batch == 4
    wanted = _recipes(3)
    for ours, theirs in zip(
        draw_together(stripped, wanted), draw_together(runner, wanted), strict=True
    ):
        assert psnr_db(ours.pixels, theirs.pixels) >= MIN_PSNR_DB
    stripped.close()


def test_torch_draws_while_plans_are_built(tmp_path: Path, runner: Runner) -> None:
    order = Order(DEMO, backend=runner.info.backend, precision="fp16", max_batch=8,
                  cache_dir=tmp_path, serve_meanwhile=True)  # fmt: skip
    both = Runner.open(order)
    assert both.info.backend == "torch"
    before = draw_together(both, _recipes(3))
    assert both._build is not None
    assert both._build.join(600)
    after = draw_together(both, _recipes(3))
    assert both.info.backend == runner.info.backend
    for one, other in zip(before, after, strict=True):
        assert psnr_db(one.pixels, other.pixels) >= MIN_PSNR_DB
    both.close()
