"""Few-step checkpoints as their authors have them drawn: pinned here, and by diffusers there.

The weights are random and of Stable Diffusion's shape; scheduler, steps, timesteps and guidance
are each recipe's own, as README.md lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from engines.drawing.runner import Runner
from engines.errors import InvalidInput
from engines.facts import Defaults
from engines.order import Order
from tests.engines.checkpoints import SCHEDULE, make_lora, with_scheduler
from tests.engines.peers import Peer, assert_agree, draw_together, psnr_db

pytestmark = pytest.mark.filterwarnings(
    # diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2.4 deprecates.
    "ignore:__array__ implementation:DeprecationWarning",
)
TRAILING = SCHEDULE | {"timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": False}
EULER = TRAILING | {"_class_name": "EulerDiscreteScheduler"}
LCM = SCHEDULE | {"_class_name": "LCMScheduler", "clip_sample": False}
TCD = LCM | {"_class_name": "TCDScheduler"}


class Case(NamedTuple):
    """A scheduler config and what is pinned over it; step counts and η that are drawn."""

    config: dict[str, Any]
    pinned: Defaults
    steps: Sequence[int]
    etas: Sequence[float] = (0.0,)


CASES = {
    "turbo": Case(
        TRAILING | {"_class_name": "EulerAncestralDiscreteScheduler"},
        Defaults(num_steps=1, guidance_scale=0.0), (1, 2, 3, 4),
    ),
    "lightning": Case(EULER, Defaults(num_steps=4, guidance_scale=0.0), (2, 4, 8)),
    "lightning-1": Case(
        EULER | {"prediction_type": "sample"}, Defaults(num_steps=1, guidance_scale=0.0), (1,)
    ),
    "hyper-ddim": Case(
        TRAILING | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False},
        Defaults(num_steps=2, guidance_scale=0.0), (2, 4, 8),
    ),
    "hyper-tcd": Case(TCD, Defaults(num_steps=4, guidance_scale=0.0), (1, 2, 4, 8), (0.3, 1.0)),
    "hyper-1": Case(LCM, Defaults(guidance_scale=0.0, timesteps=(800,)), (1,)),
    "dmd2": Case(LCM, Defaults(guidance_scale=0.0, timesteps=(999, 749, 499, 249)), (4,)),
    "dmd2-1": Case(LCM, Defaults(guidance_scale=0.0, timesteps=(399,)), (1,)),
}  # fmt: skip


def open_pinned(name: str, checkpoints: Path, folder: Path, **order: Any) -> tuple[Runner, Path]:
    case = CASES[name]
    model = with_scheduler(case.config, checkpoints / "tiny-sd", folder / name)
    order = {"backend": "torch", "num_threads": 1, "defaults": case.pinned} | order
    return Runner.open(Order(str(model), **order)), model


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_draws_as_diffusers_does(name: str, checkpoints: Path, tmp_path: Path) -> None:
    case = CASES[name]
    runner, model = open_pinned(name, checkpoints, tmp_path)
    assert case.config["_class_name"] == runner.info.scheduler
    assert not runner.info.stands_in
    wanted = [
        dataclasses.replace(runner.default_recipe(num_steps, "a red cube", num_steps), eta=eta)
        for num_steps in case.steps
        for eta in case.etas
    ]
    assert {each.timesteps for each in wanted} == {case.pinned.timesteps}
    peer = Peer(model)
    for each, ours in zip(wanted, draw_together(runner, wanted), strict=True):
        assert_agree(ours, peer.draw(each), (name, each))
    runner.close()


def test_lcm_lora(checkpoints: Path, tmp_path: Path) -> None:
    """LCM over a plain checkpoint with a LoRA; guidance above 1 is a second lane."""
    lora = make_lora(checkpoints / "tiny-sd", tmp_path / "lcm", ["to_q", "to_k", "to_v"])
    model = with_scheduler(LCM, checkpoints / "tiny-sd", tmp_path / "model")
    defaults = Defaults(num_steps=4, guidance_scale=1.0)
    order = Order(str(model), "torch", num_threads=1, loras={"lcm": lora}, defaults=defaults)
    runner, peer = Runner.open(order), Peer(model, loras={"lcm": lora})
    plain = dataclasses.replace(runner.default_recipe(3, "a red cube", 4), eta=0.0)
    for guidance_scale in (0.0, 1.0, 1.5):
        wanted = dataclasses.replace(plain, loras={"lcm": 1.0}, guidance_scale=guidance_scale)
        (ours,) = draw_together(runner, [wanted])
        assert_agree(ours, peer.draw(wanted), guidance_scale)
    runner.close()


def test_guidance_0_is_none(checkpoints: Path, tmp_path: Path) -> None:
    """One lane, and a negative prompt that says nothing: the same as guidance 1, and not as 2."""
    runner, _ = open_pinned("dmd2", checkpoints, tmp_path)
    off = dataclasses.replace(runner.default_recipe(3, "a red cube", 4), negative_prompt="dark")
    wanted = [dataclasses.replace(off, guidance_scale=scale) for scale in (0.0, 1.0, 2.0)]
    assert [runner.start(each).num_lanes for each in wanted] == [1, 1, 2]
    none, one, two = draw_together(runner, wanted)
    np.testing.assert_array_equal(none.pixels, one.pixels)
    assert psnr_db(none.pixels, two.pixels) < 50
    runner.close()


def test_euler_ancestral_has_no_rule_for_a_prediction_of_the_sample(
    checkpoints: Path, tmp_path: Path
) -> None:
    """diffusers' scheduler refuses it too, at the first step."""
    runner, model = open_pinned("lightning-1", checkpoints, tmp_path)
    assert "euler_ancestral" not in runner.info.samplers
    wanted = dataclasses.replace(runner.default_recipe(3), sampler="euler_ancestral", eta=0.0)
    with pytest.raises(InvalidInput, match="option prediction_type='sample'; use lcm, ddim, euler"):
        runner.start(wanted)
    with pytest.raises(NotImplementedError, match="sample"):
        Peer(model).draw(wanted)
    runner.close()
