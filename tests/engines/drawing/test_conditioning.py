"""Conditioning is whatever a family says: nobody on the way to the engine knows its names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.drawing.drawing import Drawing
from engines.drawing.lanes import Lanes
from engines.drawing.model import load_model
from engines.drawing.runner import Runner
from engines.facts import Facts
from engines.families import stable_diffusion
from engines.families.family import Conditions
from engines.families.recipe import Recipe
from engines.order import Order
from engines.samplers import Schedule
from tests.engines.peers import recipe


@pytest.fixture
def runner(checkpoints: Path) -> Runner:
    return Runner(load_model(Order(str(checkpoints / "tiny-sd"), "torch"), lambda *_: None))


def _with(
    monkeypatch: pytest.MonkeyPatch,
    *,
    tensors: Mapping[str, tuple[Tensor, ...]] | None = None,
    tables: Mapping[str, np.ndarray] | None = None,
    blank: bool = False,
) -> None:
    """A family whose recipes ask for more; ``blank``: guided rows lead away from no text at all."""
    plain = stable_diffusion.conditions

    def conditions(facts: Facts, recipe: Recipe, schedule: Schedule) -> Conditions:
        found = plain(facts, recipe, schedule)
        texts = (found.texts[0], None) if blank and len(found.texts) == 2 else found.texts
        return Conditions(texts, found.latents, tensors or {}, tables or {})

    monkeypatch.setattr(stable_diffusion, "conditions", conditions)


def _started(runner: Runner, **changes: object) -> Drawing:
    drawing = runner.start(recipe(**changes))
    runner.encode_text([drawing])
    return drawing


def test_each_lane_has_its_own_and_each_row_what_its_lanes_share(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    guided = {"guidance_scale": 5.0, "negative_prompt": "dark"}
    _with(monkeypatch, tensors={"mask": (torch.full((1, 8, 8), 0.5),)})
    shared = _started(runner)
    _with(monkeypatch, tensors={"mask": (torch.zeros(1, 8, 8), torch.ones(1, 8, 8))})
    own = _started(runner, **guided)
    inputs = Lanes([shared, own], "cpu").inputs()
    assert inputs["mask"].mean(dim=(1, 2, 3)).tolist() == [0.5, 0.0, 1.0]
    assert inputs["mask"].shape == (3, 1, 8, 8)
    assert inputs["prompt_embeds"].shape[0] == 3


def test_a_number_for_each_step_follows_its_row(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with(monkeypatch, tables={"control_scale": np.asarray([1, 0.5, 0.25, 0], np.float32)})
    ahead, behind = _started(runner), _started(runner, seed=4)
    for table in (ahead.tables, behind.tables):
        assert table.keys() == {"coefficients", "timestep", "control_scale"}
    ahead.step_index = 1
    lanes = Lanes([ahead, behind], "cpu")
    assert lanes.inputs()["control_scale"].tolist() == [0.5, 1.0]
    same = torch.zeros(2, 4, 8, 8)
    lanes.advance({"next_sample": same, "denoised": same})
    assert lanes.inputs()["control_scale"].tolist() == [0.25, 0.5]


def test_no_text_is_zeros_and_an_empty_one_is_encoded(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = _started(runner, guidance_scale=5.0)
    _with(monkeypatch, blank=True)
    blank = _started(runner, guidance_scale=5.0)
    assert blank.num_lanes == 2
    assert torch.equal(
        blank.conditioning["prompt_embeds"][0], empty.conditioning["prompt_embeds"][0]
    )
    assert not blank.conditioning["prompt_embeds"][1].any()
    assert empty.conditioning["prompt_embeds"][1].any()


def test_what_cannot_be_stacked_shares_no_call(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = []
    for num_tokens in (0, 4, 4, 7):
        _with(monkeypatch, tensors={"tokens": (torch.zeros(num_tokens, 8),)} if num_tokens else {})
        groups.append(runner.start(recipe(seed=num_tokens)).group)
    none, four, same, seven = groups
    assert four == same
    assert len({none, four, seven}) == 3


def test_a_step_is_given_what_the_one_before_gave_as_denoised(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the seventh coefficient asks for it: in the same layout, in a new one, in two lanes."""
    for changes in ({}, {"guidance_scale": 5.0, "negative_prompt": "dark"}):
        drawing = _started(runner, **changes)
        coefficients = drawing.tables["coefficients"].copy()
        coefficients[1:, 6] = 0.1
        drawing.tables = {**drawing.tables, "coefficients": coefficients}
        lanes = Lanes([drawing], "cpu")
        assert torch.equal(lanes.inputs()["previous"][0], drawing.latents)
        outputs = [torch.randn(drawing.num_lanes, 4, 8, 8) for _ in range(2)]
        lanes.advance(dict(zip(("next_sample", "denoised"), outputs, strict=True)))
        for layout in (lanes, Lanes([drawing], "cpu")):
            previous = layout.inputs()["previous"]
            assert len(previous) == drawing.num_lanes
            assert all(torch.equal(row, outputs[1][0]) for row in previous)
