"""Prompts that go on in further windows, against Compel's embeddings in diffusers' pipelines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.drawing.runner import Runner
from engines.families.recipe import Blend, Recipe
from engines.order import Order
from tests.engines.checkpoints import make_lora, make_xl_checkpoint
from tests.engines.compel import Words, encode
from tests.engines.conftest import BACKENDS
from tests.engines.peers import Peer, assert_agree, draw_together, recipe

ROOM = 14  # tokens of a window that are no marks; each letter is one
SHORT, FULL, TWO, THREE = "a cube", "x" * ROOM, "a small red cube on a sea", "blue " * 9
PAIRS = [  # prompt and negative prompt, where there is guidance
    (SHORT, None), (FULL, SHORT), (TWO, None), (TWO, SHORT), (SHORT, TWO), (THREE, TWO),
    (TWO, ""), (SHORT, SHORT),
]  # fmt: skip


@pytest.fixture(scope="module", params=["tiny-sd", "tiny-xl"])
def checkpoint(
    request: pytest.FixtureRequest, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "tiny-xl":
        return make_xl_checkpoint(tmp_path_factory.mktemp("xl") / "tiny-xl")
    return checkpoints / request.param


@pytest.fixture(scope="module")
def lora(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora")
    return make_lora(checkpoint, out, ["to_k", "to_v"], text_encoder=True)


@pytest.fixture(scope="module")
def peer(checkpoint: Path, lora: Path) -> Peer:
    return Peer(checkpoint, loras={"it": lora}, encode=encode)


@pytest.fixture(scope="module", params=BACKENDS)
def runner(
    request: pytest.FixtureRequest, checkpoint: Path, lora: Path, cache_dir: Path
) -> Iterator[Runner]:
    order = Order(
        str(checkpoint), request.param, cache_dir=cache_dir, num_threads=1, max_batch=8,
        loras={"it": lora}, long_prompts=True,
    )  # fmt: skip
    opened = Runner.open(order)
    yield opened
    opened.close()


def _recipes() -> list[Recipe]:
    return [
        recipe(
            prompt=Words(prompt), negative_prompt=None if negative is None else Words(negative),
            guidance_scale=4.0, sampler="euler", seed=seed, num_steps=2 + seed % 3,
        )
        for seed, (prompt, negative) in enumerate(PAIRS)
    ]  # fmt: skip


def test_pictures_are_those_of_compel_alone_and_among_others(runner: Runner, peer: Peer) -> None:
    recipes = [
        *_recipes(),
        recipe(prompt=Words(TWO), sampler="lcm"),
        recipe(prompt=Words(TWO), sampler="lcm", loras={"it": 0.8}),
    ]
    together = draw_together(runner, recipes)
    for wanted, ours in zip(recipes, together, strict=True):
        what = (wanted.prompt, wanted.negative_prompt, wanted.loras)
        assert_agree(ours, peer.draw(wanted), what)
        (alone,) = draw_together(runner, [wanted])
        assert_agree(alone, ours, what)


def test_rows_of_other_lengths_never_share_a_call(runner: Runner) -> None:
    rows = [runner.start(wanted) for wanted in _recipes()]
    lengths = [row.group.num_chunks for row in rows]
    assert lengths == [1, 1, 2, 2, 2, 3, 2, 1]
    assert len({row.group for row in rows}) == 3
    runner.encode_text(rows)
    width = {row.condition("prompt_embeds")[0].shape[0] for row in rows}
    assert width == {16, 32, 48}
    for row in rows:
        lanes = row.condition("prompt_embeds")
        assert len({lane.shape for lane in lanes}) == 1


def test_what_three_windows_have_no_room_for_is_counted(runner: Runner) -> None:
    fits, longer = (runner.start(recipe(prompt="x " * n)) for n in (3 * ROOM, 3 * ROOM + 5))
    assert (fits.num_truncated_tokens, longer.num_truncated_tokens) == ((0,), (5,))
    assert fits.group.num_chunks == longer.group.num_chunks == 3
    for one, other in zip(fits.texts.tokens, longer.texts.tokens, strict=True):
        assert all((one[name] == other[name]).all() for name in one)


def test_a_blend_of_a_short_and_a_long_prompt(runner: Runner) -> None:
    plain = recipe(prompt=SHORT, sampler="lcm")
    whole = dataclasses.replace(plain, blends=(Blend(THREE, 1.0),))
    (ours,) = draw_together(runner, [whole])
    (theirs,) = draw_together(runner, [dataclasses.replace(plain, prompt=THREE)])
    assert_agree(ours, theirs)
    row = runner.start(whole)
    runner.encode_text([row])
    assert row.condition("prompt_embeds")[0].shape[0] == 48


def test_what_fits_is_encoded_as_ever(runner: Runner, checkpoint: Path) -> None:
    plain = Runner.open(Order(str(checkpoint), "torch", num_threads=1))
    wanted: dict[str, Any] = {"prompt": FULL, "negative_prompt": SHORT, "guidance_scale": 4.0}
    rows = [each.start(recipe(**wanted)) for each in (runner, plain)]
    for each, row in zip((runner, plain), rows, strict=True):
        each.encode_text([row])
    for one, other in zip(*(row.condition("prompt_embeds") for row in rows), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    cut = plain.start(recipe(prompt=TWO))
    assert (cut.group.num_chunks, cut.num_truncated_tokens) == (1, (5,))
    plain.close()
