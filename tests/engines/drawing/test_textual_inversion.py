"""A word of several vectors in a checkpoint's tokenizer, against diffusers' own pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from engines.drawing.runner import Runner
from engines.order import Order
from tests.engines.conftest import BACKENDS
from tests.engines.peers import Peer, assert_agree, draw_together, recipe


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<cat>` is three vectors, `<dog>` one."""
    torch.manual_seed(0)
    source = checkpoints / "tiny-sd"
    folder = Path(shutil.copytree(source, tmp_path_factory.mktemp("words") / "tiny-words"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_textual_inversion(torch.randn(3, 32), token="<cat>")
    pipeline.load_textual_inversion(torch.randn(1, 32), token="<dog>")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> Peer:
    return Peer(checkpoint)


@pytest.fixture(scope="module", params=BACKENDS)
def runner(request: pytest.FixtureRequest, checkpoint: Path, cache_dir: Path) -> Iterator[Runner]:
    order = Order(str(checkpoint), request.param, cache_dir=cache_dir, num_threads=1)
    runner = Runner.open(order)
    yield runner
    runner.close()


@pytest.mark.parametrize(
    "prompt",
    ["a <cat>", "my<cat>, a <dog> and a <cat>", "<dog>", "<CAT>", "<cat>_1", "<cat> " * 9, "a cat"],
)
def test_every_vector_counts(prompt: str, runner: Runner, peer: Peer) -> None:
    wanted = recipe(prompt=prompt, sampler="ddim", negative_prompt="a <cat>", guidance_scale=3.0)
    (ours,) = draw_together(runner, [wanted])
    assert_agree(ours, peer.draw(wanted), prompt)


def test_vectors_that_found_no_room_are_counted(runner: Runner) -> None:
    room = runner.info.max_tokens - 2  # begin and end
    fits, six, none = (runner.start(recipe(prompt="<cat> " * n)) for n in (4, 6, 0))
    lost = [drawing.num_truncated_tokens for drawing in (fits, six, none)]
    assert lost == [(0,), (18 - room,), (0,)]
