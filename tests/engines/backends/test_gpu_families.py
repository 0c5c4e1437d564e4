"""Every family of models on this machine's GPU, by torch, from small random checkpoints.

The reference is the same checkpoint by torch on the CPU in fp32, which the other tests hold to
diffusers' own pipelines. FOURSTEP_GPU_TESTS_DEVICE=cpu runs all of it without a GPU. Like
test_gpu.py it needs neither ray nor httpx nor peft.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.backends.choice import Machine, choose_backend
from engines.drawing.runner import Runner
from engines.errors import BackendUnavailable
from engines.families.recipe import Recipe
from engines.order import Order
from tests.engines.checkpoints import (
    make_checkpoint,
    make_pixart_checkpoint,
    make_tiny_vae,
    make_xl_checkpoint,
)
from tests.engines.peers import draw_together, psnr_db, recipe

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("FOURSTEP_GPU_TESTS_DEVICE", "cuda")
SAME_DB = 50.0  # of fp32 on two devices, and of a graph and the eager run before it
HALF_DB = {"fp16": 45.0, "bf16": 38.0}  # against fp32; on a CPU 54 and 50 at least
TURNS = 3  # a shape met first runs eagerly, then it is captured, then replayed
MAX_BATCH = 8

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)
MASK = np.hypot(*(np.indices((64, 64)) - 30)) < 17


def _mixed(*changes: dict[str, Any]) -> tuple[Recipe, ...]:
    return tuple(recipe(seed=seed, **each) for seed, each in enumerate(changes))


OF_PICTURES = _mixed(
    {"num_steps": 4},
    {"num_steps": 1, "sampler": "ddim"},
    {"num_steps": 2, "guidance_scale": 3.0, "negative_prompt": "a blue ball"},
    {"num_steps": 3, "image": IMAGE, "strength": 0.7, "sampler": "euler"},
    {"num_steps": 4, "image": IMAGE, "strength": 0.8, "mask": MASK, "sampler": "dpmpp_2m"},
    {"num_steps": 2, "width_px": 72, "height_px": 104},  # halves to odd sides
)
OF_TWO_DECODERS = _mixed(
    {"num_steps": 2, "width_px": 128, "height_px": 96},  # in tiles of 64 px
    {"num_steps": 1, "decoder": "tiny"},
    {"num_steps": 2, "decoder": "tiny", "width_px": 128, "height_px": 96},
    {"num_steps": 2, "image": IMAGE, "strength": 0.6},
)
OF_XL = _mixed(
    {"num_steps": 4},
    {"num_steps": 2, "guidance_scale": 3.0},  # no negative prompt: zeros, pooled ones too
    {"num_steps": 3, "guidance_scale": 2.0, "negative_prompt": "", "sampler": "euler"},
    {"num_steps": 1, "original_size": (512, 768), "crops_coords_top_left": (8, 16)},
    {"num_steps": 4, "image": IMAGE, "strength": 0.6},
    {"num_steps": 3, "image": IMAGE, "strength": 0.8, "mask": MASK, "guidance_scale": 2.0},
)
PIXART_IMAGE = IMAGE.repeat(4, 0).repeat(4, 1)
OF_PIXART = _mixed(
    *(
        {"width_px": 256, "height_px": 256, **each}
        for each in (
            {"num_steps": 4},
            {"num_steps": 2, "guidance_scale": 2.0, "negative_prompt": "a blue ball"},
            {"num_steps": 1, "prompt": ""},
            {"num_steps": 3, "prompt": "long " * 60, "sampler": "ddim"},
            {"num_steps": 4, "image": PIXART_IMAGE, "strength": 0.5},
            {"num_steps": 2, "width_px": 288},  # drawn at 272 x 240
        )
    )
)
SOME_PIXART = OF_PIXART[1:4]
OF_CLIPS = _mixed(
    {"num_steps": 4, "num_frames": 5},
    {"num_steps": 2, "num_frames": 5, "guidance_scale": 1.5, "sampler": "ddim"},
    {"num_steps": 1, "num_frames": 5, "prompt": ""},
    {"num_steps": 2, "num_frames": 8},  # decoded in pieces
    {"num_steps": 2, "num_frames": 1},
    {"num_steps": 2, "num_frames": 2, "width_px": 72, "height_px": 104},
)
OF_TILED_CLIPS = _mixed(
    {"num_steps": 1, "num_frames": 3, "width_px": 104, "height_px": 128},
    {"num_steps": 1, "num_frames": 3, "width_px": 104, "height_px": 128, "decoder": "tiny"},
)
OF_DEMO_CLIPS = _mixed(
    *(
        {"prompt": "a large red star", "width_px": 128, "height_px": 128, **each}
        for each in ({"num_steps": 4, "num_frames": 5}, {"num_steps": 1, "num_frames": 5})
    )
)


@dataclass(frozen=True)
class Kind:
    """A checkpoint, how it is opened, and what is drawn of it."""

    recipes: tuple[Recipe, ...]
    make: Callable[[Path], Path] | str  # or the name of a fixture, or of a shipped model
    options: dict[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] = ("fp16",)
    tiny: bool = False  # with a tiny decoder beside its own


KINDS = {
    "sd": Kind(OF_PICTURES, lambda at: make_checkpoint(at, lcm=False)),
    "sd, tiles and a tiny decoder": Kind(
        OF_TWO_DECODERS, lambda at: make_checkpoint(at, lcm=True), {"vae_tiling_px": 64}, tiny=True
    ),
    "sd, 9 channels": Kind(
        OF_PICTURES, lambda at: make_checkpoint(at, lcm=False, inpainting=True)
    ),
    "sdxl": Kind(OF_XL, make_xl_checkpoint),
    "sdxl, pruned": Kind(OF_XL[:3], lambda at: make_xl_checkpoint(at, pruned=True)),
    "pixart": Kind(OF_PIXART, make_pixart_checkpoint, precisions=("fp16", "bf16")),
    "pixart, told its size": Kind(OF_PIXART[1:], lambda at: make_pixart_checkpoint(at, told=True)),
    "pixart, sigma": Kind(SOME_PIXART, lambda at: make_pixart_checkpoint(at, sigma=True)),
    "pixart, T5 in 8 bits": Kind(
        SOME_PIXART, make_pixart_checkpoint, {"t5_int8": True}
    ),
    "clips": Kind(OF_CLIPS, "tiny_clips"),
    "clips, tiles and a tiny decoder": Kind(
        OF_TILED_CLIPS, "tiny_clips", {"vae_tiling_px": 64}, tiny=True
    ),
    "clips, shipped": Kind(OF_DEMO_CLIPS, "demo-motion"),
}  # fmt: skip
HALVES = [(name, precision) for name, kind in KINDS.items() for precision in kind.precisions]


@pytest.fixture(scope="module", autouse=True)
def _whole_fp32() -> Iterator[None]:
    """fp32 is fp32: cuDNN would round to TF32, which has no more digits than fp16."""
    if DEVICE == "cuda":
        try:
            choose_backend("torch", Machine.here(), device="cuda")
        except BackendUnavailable as error:
            pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


@pytest.fixture(scope="module")
def order(
    request: pytest.FixtureRequest, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Order]:
    """What opens a kind, by its name; checkpoints are made once."""
    made: dict[str, Order] = {}

    def of(name: str, **changes: Any) -> Order:
        if name not in made:
            kind, folder = KINDS[name], tmp_path_factory.mktemp("family")
            if callable(kind.make):
                model = str(kind.make(folder / "model"))
            else:
                shipped = kind.make.startswith("demo")
                model = kind.make if shipped else str(request.getfixturevalue(kind.make))
            tiny = {"tiny_vae": str(make_tiny_vae(folder / "tiny"))} if kind.tiny else {}
            made[name] = Order(
                model, "torch", "fp32", cache_dir, max_batch=MAX_BATCH, device=DEVICE,
                **tiny, **kind.options,
            )  # fmt: skip
        return dataclasses.replace(made[name], **changes)

    return of


@pytest.fixture(scope="module")
def references(order: Callable[..., Order]) -> Callable[[str], list[np.ndarray]]:
    """Pictures of a kind's recipes in fp32 by the CPU, drawn once."""
    drawn: dict[str, list[np.ndarray]] = {}

    def of(name: str) -> list[np.ndarray]:
        if name not in drawn:
            runner = Runner.open(order(name, device="cpu", num_threads=1))
            drawn[name] = _pictures(runner, KINDS[name].recipes)
            runner.close()
        return drawn[name]

    return of


def _pictures(runner: Runner, recipes: tuple[Recipe, ...]) -> list[np.ndarray]:
    """With texts encoded anew."""
    runner._prompts.clear()
    return [drawn.pixels for drawn in draw_together(runner, recipes)]


def _assert_near(ours: list[np.ndarray], theirs: list[np.ndarray], limit: float) -> None:
    found = [psnr_db(one, other) for one, other in zip(ours, theirs, strict=True)]
    assert min(found) >= limit, found


def _assert_graphs(runner: Runner) -> None:
    """All that came twice is a graph: nothing in a forward keeps it from being captured."""
    if DEVICE != "cuda":
        return
    for name, engine in runner._model.engines.items():
        graphs = engine._graphs  # type: ignore[attr-defined]
        tried = [each for each in graphs._met.values() if each is not None]
        assert all(each.graph is not None for each in tried), name
        if graphs._met:
            assert graphs.num_replays > 0, name


@pytest.mark.parametrize("name", KINDS)
def test_single_precision_is_a_cpus(
    name: str, order: Callable[..., Order], references: Callable[[str], list[np.ndarray]]
) -> None:
    runner = Runner.open(order(name))
    assert runner.device == DEVICE
    _assert_near(_pictures(runner, KINDS[name].recipes), references(name), SAME_DB)
    runner.close()


@pytest.mark.parametrize(("name", "precision"), HALVES)
def test_half_precision(
    name: str, precision: str, order: Callable[..., Order],
    references: Callable[[str], list[np.ndarray]],
) -> None:  # fmt: skip
    """One row, three and all that are mixed; eagerly, as graphs are captured, and by them."""
    recipes, theirs = KINDS[name].recipes, references(name)
    runner = Runner.open(order(name, precision=precision))
    for chosen in (slice(1), slice(3), slice(None)):
        eager = _pictures(runner, recipes[chosen])
        _assert_near(eager, theirs[chosen], HALF_DB[precision])
        for _ in range(TURNS - 1):
            _assert_near(_pictures(runner, recipes[chosen]), eager, SAME_DB)
    _assert_graphs(runner)
    runner.close()


@pytest.mark.parametrize("name", ["sdxl", "pixart", "clips"])
def test_warm_up_leaves_nothing_to_go_wrong(
    name: str, order: Callable[..., Order], references: Callable[[str], list[np.ndarray]]
) -> None:
    runner = Runner.open(order(name, precision="fp16", max_batch=2))
    runner.warm_up()
    drawn = _pictures(runner, KINDS[name].recipes[:1])
    _assert_near(drawn, references(name)[:1], HALF_DB["fp16"])
    _assert_graphs(runner)
    runner.close()
