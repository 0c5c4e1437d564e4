"""Checkpoints with scheduler configs as people have them, against diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.drawing.runner import Runner
from engines.order import Order
from tests.engines.checkpoints import SCHEDULE, with_scheduler
from tests.engines.peers import Peer, assert_agree, draw_together, recipe

pytestmark = [
    # diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2.4 deprecates.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # StableDiffusionPipeline corrects such configs, and says so.
    pytest.mark.filterwarnings("ignore:.*(steps_offset|clip_sample)`:FutureWarning"),
]
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
DPM = {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "leading"}
CONFIGS: dict[str, dict[str, Any]] = {  # and the sampler that draws unless another is asked for
    "stable-diffusion-v1-5": PNDM | {"steps_offset": 1, "clip_sample": False, "draws": "ddim"},
    "older": PNDM | {"draws": "ddim"},
    "ddim": {"_class_name": "DDIMScheduler", "draws": "ddim"},
    "euler": {"_class_name": "EulerDiscreteScheduler", "draws": "euler"},
    "euler-karras": {
        "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "steps_offset": 1,
        "timestep_spacing": "leading", "draws": "euler",
    },
    "dpm": DPM | {"use_karras_sigmas": True, "solver_type": "heun", "draws": "dpmpp_2m"},
    "dpm-sde": DPM | {
        "algorithm_type": "sde-dpmsolver++", "euler_at_final": True, "steps_offset": 1,
        "draws": "dpmpp_2m_sde",
    },
    "unipc": {"_class_name": "UniPCMultistepScheduler", "solver_order": 2, "draws": "dpmpp_2m"},
    "deis": {"_class_name": "DEISMultistepScheduler", "draws": "dpmpp_2m"},
    "zero-snr": {
        "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "clip_sample": False,
        "prediction_type": "v_prediction", "timestep_spacing": "trailing", "draws": "ddim",
    },
}  # fmt: skip
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_sampler_draws_as_diffusers_does(
    name: str, checkpoints: Path, tmp_path: Path
) -> None:
    config = SCHEDULE | CONFIGS[name]
    draws = config.pop("draws")
    folder = with_scheduler(config, checkpoints / "tiny-sd", tmp_path / name)
    runner = Runner.open(Order(str(folder), backend="torch", num_threads=1))
    assert runner.info.scheduler == config["_class_name"]
    assert runner.info.default_sampler == draws
    assert runner.info.stands_in == config["_class_name"].startswith(("PNDM", "UniPC", "DEIS"))
    peer = Peer(folder)
    for sampler in runner.info.samplers:
        for more in ({}, {"image": IMAGE, "strength": 0.6}):
            wanted = recipe(sampler=sampler, num_steps=5, guidance_scale=4.0, **more)
            (ours,) = draw_together(runner, [wanted])
            assert_agree(ours, peer.draw(wanted), (sampler, more.keys()))
    runner.close()


@pytest.mark.parametrize(
    ("scheduler", "sampler"), [("LMSDiscreteScheduler", "euler"), ("SomebodysScheduler", "ddim")]
)
def test_a_scheduler_that_diffusers_cannot_load_has_a_stand_in(
    scheduler: str, sampler: str, checkpoints: Path, tmp_path: Path
) -> None:
    """LMS needs scipy; options of such a file count all the same."""
    config = SCHEDULE | {"_class_name": scheduler, "prediction_type": "v_prediction"}
    folder = with_scheduler(config, checkpoints / "tiny-sd", tmp_path / "other")
    runner = Runner.open(Order(str(folder), backend="torch", num_threads=1))
    info = runner.info
    assert (info.scheduler, info.default_sampler, info.stands_in) == (scheduler, sampler, True)
    config["_class_name"] = "DDIMScheduler"
    known = with_scheduler(config, checkpoints / "tiny-sd", tmp_path / "ddim")
    wanted = recipe(sampler=sampler, num_steps=5, guidance_scale=4.0)
    (ours,) = draw_together(runner, [wanted])
    assert_agree(ours, Peer(known).draw(wanted), scheduler)
    runner.close()
