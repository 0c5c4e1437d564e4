"""Weights in prompts: their syntax against diffusers' own examples, their effect against Compel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.drawing.runner import Runner
from engines.drawing.weighting import MAX_WEIGHT, runs_of
from engines.errors import InvalidInput
from engines.order import Order
from tests.engines.checkpoints import make_lora, make_xl_checkpoint
from tests.engines.compel import Words, encode
from tests.engines.peers import Peer, assert_agree, draw_together, recipe

# The first six are those of `parse_prompt_attention` in diffusers' community pipelines
# (examples/community/lpw_stable_diffusion.py).
EXAMPLES: dict[str, list[tuple[str, float]]] = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
        (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1),
    ],
    "": [],
    "[less]": [("less", 1 / 1.1)],
    "a) b] 3:4 :1.5)": [("a) b] 3:4 :1.5)", 1.0)],
    "(a:-0.5)": [("a", -0.5)],
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
    "a\\b": [("a\\b", 1.0)],
    "((a]": [("a]", 1.21)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_examples(prompt: str) -> None:
    found = runs_of(prompt)
    assert [text for text, _ in found] == [text for text, _ in EXAMPLES[prompt]]
    weights = [weight for _, weight in found]
    assert weights == pytest.approx([weight for _, weight in EXAMPLES[prompt]])


@settings(deadline=None)
@given(st.text(alphabet="ab ()[]\\:.1", max_size=30))
def test_no_text_is_lost_and_none_is_made_up(prompt: str) -> None:
    """Letters outlive any brackets, and without brackets or backslashes all does."""
    try:
        said = "".join(text for text, _ in runs_of(prompt))
    except InvalidInput:
        return
    letters = [[letter for letter in text if letter in "ab"] for text in (prompt, said)]
    assert letters[0] == letters[1]
    if not set(prompt) & set("()[]\\"):
        assert said == prompt


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
def runner(checkpoint: Path, lora: Path, cache_dir: Path) -> Iterator[Runner]:
    opened = Runner.open(
        Order(str(checkpoint), "torch", num_threads=1, max_batch=8, loras={"it": lora},
              long_prompts=True)
    )  # fmt: skip
    yield opened
    opened.close()


PLAIN = Words("a cube")
STRONG = Words("a (red:1.4) [cube]", [("a ", 1.0), ("red", 1.4), (" ", 1.0), ("cube", 1 / 1.1)])
LONG = Words(
    "a small (red cube on:1.3) the (blue sea:0.6)",
    [("a small ", 1.0), ("red cube on", 1.3), (" the ", 1.0), ("blue sea", 0.6)],
)


def test_pictures_are_those_of_compel_alone_and_among_others(
    runner: Runner, checkpoint: Path, lora: Path
) -> None:
    peer = Peer(checkpoint, loras={"it": lora}, encode=encode)
    pairs = [(STRONG, PLAIN), (PLAIN, STRONG), (LONG, STRONG), (STRONG, LONG), (STRONG, None)]
    recipes = [
        recipe(
            prompt=prompt, negative_prompt=negative, guidance_scale=4.0, sampler="euler",
            seed=seed, num_steps=2 + seed % 3, prompt_weighting=True, loras=loras,
        )
        for seed, (prompt, negative) in enumerate(pairs)
        for loras in ({}, {"it": 0.8})
    ]  # fmt: skip
    for wanted, ours in zip(recipes, draw_together(runner, recipes), strict=True):
        what = (wanted.prompt, wanted.negative_prompt, wanted.loras)
        assert_agree(ours, peer.draw(wanted), what)
        (alone,) = draw_together(runner, [wanted])  # by now all that was encoded is known
        assert_agree(alone, ours, what)


def test_brackets_are_text_where_nothing_was_asked(runner: Runner) -> None:
    wanted = {name: runner.start(recipe(prompt="(a)", prompt_weighting=name)) for name in (0, 1)}
    ids = [[each["input_ids"].tolist() for each in row.texts.tokens] for row in wanted.values()]
    plain = [each["input_ids"].tolist() for each in runner.start(recipe(prompt="a")).texts.tokens]
    assert ids[0] != plain
    assert ids[1][:1] == plain


def test_weights_of_1_cost_nothing_and_change_nothing(runner: Runner) -> None:
    rows = [
        runner.start(recipe(prompt=prompt, prompt_weighting=weighted))
        for prompt, weighted in (("a cube", False), ("(a cube:1)", True))
    ]
    runner.encode_text(rows)
    assert [len(row.texts.tokens) for row in rows] == [1, 1]
    one, other = (row.condition("prompt_embeds")[0] for row in rows)
    assert torch.equal(one, other)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_weights_have_a_bound(runner: Runner, field: str) -> None:
    runner.start(recipe(**{field: f"(a:{MAX_WEIGHT})"}, prompt_weighting=True))
    for weight in ("10.01", "-11"):
        with pytest.raises(InvalidInput) as caught:
            runner.start(recipe(**{field: f"x (a b:{weight})"}, prompt_weighting=True))
        assert caught.value.field == field
        assert str(caught.value) == (
            f"{field} gives 'a b' the weight {weight}; it must be from -10 to 10, brackets within "
            "brackets included"
        )
