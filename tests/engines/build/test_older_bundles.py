"""Bundles built before a denoiser looked back a step, and before texts had windows: they open."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.build.bundle import MANIFEST, Blueprint, build_bundle
from engines.drawing.runner import Runner
from engines.errors import BundleError, InvalidInput
from engines.facts import Facts
from engines.families import stable_diffusion
from engines.families.part import Part
from engines.order import Order
from engines.samplers import Schedule
from tests.engines.peers import assert_agree, draw_together, recipe


class OlderDenoiser(torch.nn.Module):
    """Takes six coefficients a step, and nothing of the step before."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, coefficients: Tensor,
        noise: Tensor, guidance: Tensor, uncond_index: Tensor, timestep_cond: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        seven = torch.nn.functional.pad(coefficients, (0, 1))
        outputs: tuple[Tensor, Tensor] = self.denoiser(
            sample, timestep, seven, noise, torch.zeros_like(sample), guidance, uncond_index,
            prompt_embeds, timestep_cond,
        )  # fmt: skip
        return outputs


def _older(part: Part) -> Part:
    if part.name != "denoiser":
        return part
    example = {name: value for name, value in part.example.items() if name != "previous"}
    example["coefficients"] = example["coefficients"][:, :6]
    dynamic = {name: dims for name, dims in part.dynamic.items() if name != "previous"}
    return dataclasses.replace(
        part, module=OlderDenoiser(part.module), example=example, dynamic=dynamic
    )


@pytest.fixture(scope="module")
def bundle(checkpoints: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = stable_diffusion.parts
    folder = tmp_path_factory.mktemp("older") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stable_diffusion,
            "parts",
            lambda pipeline, known: [_older(part) for part in parts(pipeline, known)],
        )
        build_bundle(Blueprint(checkpoints / "tiny-lcm"), folder, lambda *_: None, cache_dir)
    manifest = json.loads((folder / MANIFEST).read_text())
    facts: dict[str, Any] = manifest["facts"]
    for name in ("num_coefficients", "gives_image", "tiny_encodes", "max_chunks"):
        del facts[name]
    (window,) = facts.pop("windows")
    facts |= {name: window[name] for name in ("max_tokens", "pad_token_id", "eos_token_id")}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_it_draws_what_a_new_one_draws(
    bundle: Path, runners: dict[tuple[str, str], Runner], cache_dir: Path
) -> None:
    older = Runner.open(Order(str(bundle), "onnxruntime", cache_dir=cache_dir, num_threads=1))
    wanted = [
        recipe(sampler=sampler, seed=seed, prompt="a lost " * 40)
        for seed, sampler in enumerate(("lcm", "ddim", "euler_ancestral"))
    ]
    newer = draw_together(runners["tiny-lcm", "onnxruntime"], wanted)
    for ours, theirs in zip(draw_together(older, wanted), newer, strict=True):
        assert_agree(ours, theirs)
    older.close()


def test_it_refuses_a_sampler_that_looks_back(
    bundle: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = Runner.open(Order(str(bundle), "onnxruntime", cache_dir=cache_dir, num_threads=1))
    make = older._schedule

    def looks_back(*args: Any, **options: Any) -> Schedule:
        schedule = make(*args, **options)
        coefficients = schedule.coefficients.copy()
        coefficients[1:, 6] = 0.5
        return dataclasses.replace(schedule, coefficients=coefficients)

    monkeypatch.setattr(older, "_schedule", looks_back)
    with pytest.raises(InvalidInput, match=r"sampler is 'lcm'.*fourstep build"):
        older.start(recipe())
    older.close()


def test_it_decodes_in_no_tiles(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"which the bundle of tiny-lcm was built too early for"):
        Runner.open(Order(str(bundle), "onnxruntime", vae_tiling_px=64))


def test_long_prompts_want_another_build(bundle: Path) -> None:
    with pytest.raises(BundleError) as caught:
        Runner.open(Order(str(bundle), "onnxruntime", long_prompts=True))
    assert str(caught.value) == (
        f"{bundle} was built for prompts that fit the text encoder's window, long_prompt 'chunk' "
        f"wants 3 of them; fourstep build MODEL --out {bundle} builds it anew, long_prompt "
        "'truncate' serves it as it is"
    )


def test_facts_go_through_json(bundle: Path) -> None:
    older = Facts.from_json(json.loads((bundle / MANIFEST).read_text())["facts"])
    assert older.num_coefficients == 6
    assert Facts.from_json(json.loads(json.dumps(older.to_json()))) == older
    assert np.isscalar(older.max_tokens)
