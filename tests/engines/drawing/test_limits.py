"""What a model cannot serve is refused by name, never ignored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from engines.drawing.model import load_model
from engines.drawing.runner import Runner
from engines.drawing.stage import Stage
from engines.errors import InvalidInput
from engines.order import Order
from tests.engines.peers import recipe


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"width_px": 65}, "width_px"), ({"height_px": 0}, "height_px"),
        ({"height_px": 10**6}, "height_px"), ({"num_steps": 0}, "num_steps"),
        ({"sampler": "heun"}, "sampler"), ({"eta": 1.5}, "eta"), ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"), ({"guidance_scale": float("nan")}, "guidance_scale"),
    ],
)  # fmt: skip
def test_recipes(
    changes: dict[str, Any], field: str, runners: dict[tuple[str, str], Runner]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        runners["tiny-lcm", "torch"].start(recipe(**changes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "image", [np.zeros((64, 32, 3), np.uint8), np.zeros((64, 64, 3)), np.zeros((64, 64), np.uint8)]
)
def test_input_images(image: np.ndarray, runners: dict[tuple[str, str], Runner]) -> None:
    """One of the wrong shape would fail the whole batch it is encoded with."""
    with pytest.raises(InvalidInput) as caught:
        runners["tiny-lcm", "torch"].start(recipe(image=image))
    assert caught.value.field == "image"


def test_a_known_prompt_skips_the_text_encoder(
    runners: dict[tuple[str, str], Runner],
) -> None:
    runner = runners["tiny-sd", "torch"]
    wanted = recipe(prompt="never seen before", negative_prompt="nor this", guidance_scale=5.0)
    row = runner.start(wanted)
    assert row.stage is Stage.ENCODE_TEXT
    assert row.num_lanes == 2
    runner.encode_text([row])
    assert runner.start(wanted).stage is Stage.DENOISE


def test_a_long_prompt_says_how_much_was_lost(runners: dict[tuple[str, str], Runner]) -> None:
    runner = runners["tiny-lcm", "torch"]
    assert runner.start(recipe(prompt="ab")).num_truncated_tokens == (0,)
    assert runner.start(recipe(prompt="word " * 50)).num_truncated_tokens[0] > 100


def test_a_negative_prompt_loses_tokens_too(runners: dict[tuple[str, str], Runner]) -> None:
    runner = runners["tiny-sd", "torch"]
    wanted = recipe(prompt="ab", negative_prompt="word " * 50, guidance_scale=5.0)
    lost = runner.start(wanted).num_truncated_tokens
    assert lost[0] == 0
    assert lost[1] > 100


def test_a_tokenizer_saved_after_use_still_says_what_was_lost(
    checkpoints: Path, tmp_path: Path
) -> None:
    """It carries truncation and padding with it, which would hide every loss."""
    shutil.copytree(checkpoints / "tiny-lcm", tmp_path / "used")
    file = tmp_path / "used" / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(file))
    used, plain = (
        load_model(Order(str(folder), "torch"), lambda *_: None)
        for folder in (tmp_path / "used", checkpoints / "tiny-lcm")
    )
    for text in ("a", "word " * 50):
        ids, num_lost = used.tokenize(text)
        expected, expected_lost = plain.tokenize(text)
        assert ids is not None
        assert expected is not None
        assert ids["input_ids"].tolist() == expected["input_ids"].tolist()
        assert num_lost == expected_lost
    assert num_lost > 100
    kept = [model.tokenizers["tokenizer"].to_str() for model in (used, plain)]
    assert kept[0] == kept[1], "as a bundle has it"
