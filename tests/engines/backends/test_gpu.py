"""What only an NVIDIA GPU can show: `pytest -m gpu`. Skips name what the machine lacks.

Needs neither ray nor httpx nor peft, so that a bare machine with torch and diffusers can run it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.backends.choice import Machine, choose_backend
from engines.build.bundle import Blueprint, build_bundle
from engines.build.plan import MODULES, PlanTarget
from engines.drawing.runner import Runner
from engines.errors import BackendUnavailable, InvalidInput, OutOfMemory
from engines.families.recipe import Recipe
from engines.order import Order
from tests.engines.peers import draw_together, psnr_db, recipe

pytestmark = pytest.mark.gpu
MIN_PSNR_DB = 35.0  # of half precision against single; on a CPU fp16 is at 64 and bf16 at 53
MODELS = Path("engines/demo")
LORAS = {name: MODELS / f"demo-{name}-lora" for name in ("striped", "checkered")}
Opener = Callable[..., Runner]


def _recipes(count: int) -> list[Recipe]:
    return [
        recipe(
            prompt="a large red star at the center on a yellow background", width_px=128,
            height_px=128, seed=seed, num_steps=1 + seed % 4, guidance_scale=3.0,
        )
        for seed in range(count)
    ]  # fmt: skip


def _pictures(runner: Runner, recipes: list[Recipe]) -> list[np.ndarray]:
    return [drawn.pixels for drawn in draw_together(runner, recipes)]


def _assert_near(
    ours: list[np.ndarray], theirs: list[np.ndarray], limit: float = MIN_PSNR_DB
) -> None:
    found = [psnr_db(one, other) for one, other in zip(ours, theirs, strict=True)]
    assert min(found) >= limit, found


def _require(backend: str) -> None:
    """Skip where the backend cannot draw on a GPU here."""
    try:
        choose_backend(backend, Machine.here(), device="cuda")
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference() -> Iterator[Runner]:
    """torch on this GPU, in fp32."""
    _require("torch")
    runner = Runner.open(Order("demo-lcm", "torch", "fp32", max_batch=8, device="cuda"))
    yield runner
    runner.close()


@pytest.fixture(scope="module", params=[*sorted(MODULES), "torch"])
def open_(request: pytest.FixtureRequest, cache_dir: Path) -> Opener:
    """Opens the demo model on one backend, in fp16; plans are built here and now."""
    _require(request.param)
    plain = Order("demo-lcm", request.param, "fp16", cache_dir, max_batch=8, device="cuda")
    return lambda **changes: Runner.open(dataclasses.replace(plain, **changes))


@pytest.fixture(scope="module")
def runner(open_: Opener) -> Iterator[Runner]:
    runner = open_()
    yield runner
    runner.close()


@pytest.fixture
def plans(runner: Runner) -> str:
    """The backend, where it runs plans."""
    if runner.info.backend not in MODULES:
        pytest.skip("plans alone have this")
    return runner.info.backend


def test_the_reference_agrees_with_a_cpu(reference: Runner) -> None:
    cpu = Runner.open(Order("demo-lcm", "torch", "fp32", max_batch=8, device="cpu"))
    assert (cpu.device, reference.device) == ("cpu", "cuda")
    _assert_near(_pictures(reference, _recipes(2)), _pictures(cpu, _recipes(2)), 40.0)
    cpu.close()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_agrees_with_single_precision_at_every_bucket(
    count: int, runner: Runner, reference: Runner
) -> None:
    """3 and 5 rows may be padded to 4 and 8; the second pass may replay captured graphs."""
    theirs = _pictures(reference, _recipes(count))
    for _ in range(2):
        _assert_near(_pictures(runner, _recipes(count)), theirs)


def test_a_graph_draws_what_an_eager_run_draws(runner: Runner) -> None:
    first = _pictures(runner, _recipes(4))
    for again, expected in zip(_pictures(runner, _recipes(4)), first, strict=True):
        assert np.array_equal(again, expected)


@pytest.mark.parametrize("count", [3, 5, 7])
def test_a_row_is_the_same_alone_and_in_a_padded_batch(count: int, runner: Runner) -> None:
    """Neither neighbours nor what fills a batch up reach a row, nor does its noise know of them."""
    alone = [_pictures(runner, [each])[0] for each in _recipes(count)]
    _assert_near(_pictures(runner, _recipes(count)), alone)


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_rows_is_decoded(count: int, runner: Runner) -> None:
    """From latents that each row has of a step of its own."""
    wanted = [dataclasses.replace(each, num_steps=1) for each in _recipes(count)]
    pictures: list[list[np.ndarray]] = []
    for size in (1, count):
        rows = [runner.start(each) for each in wanted]
        runner.encode_text(rows)
        for row in rows:
            runner.denoise([row])
        for first in range(0, count, size):
            runner.decode(rows[first : first + size])
        pictures.append([row.pixels for row in rows if row.pixels is not None])
        assert [row.failure for row in rows] == [None] * count
    _assert_near(*pictures)


def test_pictures_are_drawn_from_pictures(runner: Runner, reference: Runner) -> None:
    picture = _pictures(reference, _recipes(1))[0]
    wanted = [dataclasses.replace(each, image=picture, num_steps=4, strength=0.5)
              for each in _recipes(3)]  # fmt: skip
    _assert_near(_pictures(runner, wanted), _pictures(reference, wanted))


def test_warm_up_leaves_nothing_to_go_wrong(open_: Opener, reference: Runner) -> None:
    warm = open_()
    warm.warm_up()
    _assert_near(_pictures(warm, _recipes(3)), _pictures(reference, _recipes(3)))
    warm.close()


def test_bf16_draws_the_same_picture(open_: Opener, reference: Runner) -> None:
    other = open_(precision="bf16")
    _assert_near(_pictures(other, _recipes(3)), _pictures(reference, _recipes(3)))
    other.close()


def test_a_size_without_a_profile_is_refused_before_it_runs(plans: str, runner: Runner) -> None:
    with pytest.raises(InvalidInput, match="built for 128x128"):
        runner.start(recipe(width_px=160, height_px=160))


def test_loras_come_and_go_and_leave_nothing(open_: Opener) -> None:
    """A → B → A → none, each as single precision draws it, and exactly as the time before."""
    ours = open_(loras=LORAS, max_batch=4)
    theirs = Runner.open(Order("demo-lcm", "torch", "fp32", loras=LORAS, device="cuda"))
    seen: dict[str, np.ndarray] = {}
    for name in ("", "striped", "checkered", "striped", "", "checkered"):
        wanted = [dataclasses.replace(_recipes(2)[1], loras={name: 1.0} if name else {})]
        picture = _pictures(ours, wanted)[0]
        _assert_near([picture], _pictures(theirs, wanted))
        assert np.array_equal(picture, seen.setdefault(name, picture)), name
    assert psnr_db(seen[""], seen["striped"]) < MIN_PSNR_DB
    ours.close()
    theirs.close()


def test_one_lora_target_of_a_fused_group_can_be_refitted(tmp_path: Path, open_: Opener) -> None:
    """Where q, k and v have become one, changing q alone takes the other two as well."""
    pairs = load_file(LORAS["striped"] / "pytorch_lora_weights.safetensors")
    queries = {name: value for name, value in pairs.items() if ".to_q." in name}
    assert queries
    save_file(queries, tmp_path / "queries.safetensors")
    loras = {"queries": tmp_path / "queries.safetensors"}
    wanted = [dataclasses.replace(_recipes(2)[1], loras={"queries": 1.0})]
    drawn = []
    for changes in ({"max_batch": 4}, {"backend": "torch", "precision": "fp32"}):
        opened = open_(loras=loras, **changes)
        drawn.append(_pictures(opened, wanted))
        opened.close()
    _assert_near(*drawn)


def test_two_engines_in_one_process(open_: Opener, runner: Runner, reference: Runner) -> None:
    other = open_()
    theirs = _pictures(reference, _recipes(2))
    for each in (runner, other, runner):
        _assert_near(_pictures(each, _recipes(2)), theirs)
    other.close()


def test_memory_that_is_not_there_is_an_error_and_no_crash(open_: Opener, runner: Runner) -> None:
    """A fresh engine has no buffers yet for any shape; it makes them when there is room again."""
    fresh = open_()
    wanted = _recipes(8)
    rows = [fresh.start(each) for each in wanted]
    torch.cuda.empty_cache()
    hogs, whole = [], torch.cuda.mem_get_info()[1]
    # Others of this run are on this GPU too: no room is left to this process alone.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / whole)
    for size in (2**24, 2**20, 2**16, 2**9):  # to the last piece, whatever the fragments
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                hogs.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    with pytest.raises(OutOfMemory, match="of 8 rows"):  # noqa: PT012 - either may be the first
        fresh.encode_text(rows)
        fresh.denoise(rows)
    hogs.clear()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    _assert_near(_pictures(fresh, wanted), _pictures(runner, wanted))
    fresh.close()


def test_a_stripped_plan_gets_its_weights_when_it_is_loaded(
    tmp_path: Path, plans: str, runner: Runner
) -> None:
    target = PlanTarget(plans, ((128, 128),), 4, strip=True)
    bundle = build_bundle(
        Blueprint(MODELS / "demo-lcm", "fp16", Machine.here().aim(target)),
        tmp_path / "stripped",
        lambda what, done, total: None,
    )
    stripped = Runner.open(Order(str(bundle.folder), backend=plans))
    assert stripped.info.max_batch == 4
    _assert_near(_pictures(stripped, _recipes(3)), _pictures(runner, _recipes(3)))
    stripped.close()


def test_torch_draws_while_plans_are_built(tmp_path: Path, plans: str, open_: Opener) -> None:
    both = open_(cache_dir=tmp_path, serve_meanwhile=True)
    assert both.info.backend == "torch"
    before = _pictures(both, _recipes(3))
    assert both._build is not None
    assert both._build.join(600)
    after = _pictures(both, _recipes(3))
    assert both.info.backend == plans
    _assert_near(before, after)
    both.close()
