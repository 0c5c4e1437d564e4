"""LoRAs on both backends, against diffusers' own loading, weighting and fusing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.backends import onnxruntime_engine
from engines.backends.onnxruntime_engine import OnnxRuntimeEngine
from engines.build.bundle import Blueprint, build_bundle
from engines.drawing.runner import Runner
from engines.errors import CheckpointError, InvalidInput
from engines.facts import Defaults
from engines.loras.file import read_lora
from engines.order import Order
from tests.engines.checkpoints import make_lora
from tests.engines.conftest import BACKENDS
from tests.engines.peers import Peer, assert_agree, draw_together, psnr_db, recipe

UNET_TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "everything": ["to_q", "to_v", "ff.net.2", "proj_in", "conv1", "conv2", "time_emb_proj"],
    "both": ["to_q"],
}
SETS = [
    {"attention": 1.0},
    {"everything": 0.7},
    {"attention": 0.8, "everything": -0.5},
    {"both": 1.0},
    {"both": 0.3, "everything": 1.2},
    {},
]


@pytest.fixture(scope="module")
def loras(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: make_lora(
            checkpoints / "tiny-sd", folder / name, targets, text_encoder=name == "both"
        )
        for name, targets in UNET_TARGETS.items()
    }


@pytest.fixture(scope="module")
def peer(checkpoints: Path, loras: dict[str, Path]) -> Peer:
    return Peer(checkpoints / "tiny-sd", loras=loras)


@pytest.fixture(scope="module", params=BACKENDS)
def runner(
    request: pytest.FixtureRequest, checkpoints: Path, cache_dir: Path, loras: dict[str, Path]
) -> Iterator[Runner]:
    runner = Runner.open(
        Order(
            str(checkpoints / "tiny-sd"),
            backend=request.param,
            cache_dir=cache_dir,
            max_batch=8,
            num_threads=1,
            loras=loras,
        )
    )
    yield runner
    runner.close()


def test_agrees_with_diffusers(runner: Runner, peer: Peer) -> None:
    plain = draw_together(runner, [recipe(sampler="lcm")])[0]
    for loras in SETS:
        wanted = recipe(sampler="lcm", loras=loras)
        (ours,) = draw_together(runner, [wanted])
        assert_agree(ours, peer.draw(wanted), loras)
        assert np.allclose(ours.latents, plain.latents) == (not loras)


def test_rows_of_other_sets_do_not_mix(runner: Runner, peer: Peer) -> None:
    recipes = [
        recipe(sampler="lcm", num_steps=1 + index % 4, seed=index, loras=loras)
        for index, loras in enumerate([*SETS, *SETS])
    ]
    for ours, wanted in zip(draw_together(runner, recipes), recipes, strict=True):
        assert_agree(ours, peer.draw(wanted), wanted.loras)


def test_guided_rows_take_both_prompts_through_the_lora(runner: Runner, peer: Peer) -> None:
    wanted = recipe(
        sampler="ddim", guidance_scale=4.0, negative_prompt="blurry", loras={"both": 1.0}
    )
    (ours,) = draw_together(runner, [wanted])
    assert_agree(ours, peer.draw(wanted))


def test_nothing_of_the_set_before_stays(runner: Runner) -> None:
    def draw(loras: dict[str, float]) -> np.ndarray:
        return draw_together(runner, [recipe(sampler="lcm", loras=loras)])[0].latents

    base, one = draw({}), draw({"attention": 1.0})
    other = draw({"everything": 1.0})
    assert np.array_equal(draw({"attention": 1.0}), one)
    assert np.array_equal(draw({"everything": 1.0}), other)
    assert np.array_equal(draw({"attention": 0.0}), base)


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_sessions_of_recent_sets_are_kept_as_far_as_memory_goes(
    kept_bytes: int,
    checkpoints: Path,
    cache_dir: Path,
    loras: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnxruntime_engine, "KEPT_BYTES", kept_bytes)
    source = str(checkpoints / "tiny-sd")
    order = Order(source, "onnxruntime", cache_dir=cache_dir, num_threads=1, loras=loras)
    runner = Runner.open(order)
    engine = runner._model.engines["denoiser"]
    assert isinstance(engine, OnnxRuntimeEngine)
    results, sessions = [], []
    for chosen in ({"attention": 1.0}, {"everything": 0.7}, {"attention": 1.0}, {}):
        wanted = recipe(sampler="lcm", num_steps=1, loras=chosen)
        results.append(draw_together(runner, [wanted])[0].latents)
        sessions.append(engine._sessions)
    assert np.array_equal(results[0], results[2])
    assert not np.allclose(results[0], results[1])
    assert (sessions[0] is sessions[2]) == bool(kept_bytes)
    assert len(engine._variants) == (3 if kept_bytes else 1)
    runner.close()


@pytest.mark.parametrize("chosen", [loras for loras in SETS if loras], ids=str)
def test_fused_weights_are_those_of_fuse_lora(
    runner: Runner, peer: Peer, chosen: dict[str, float]
) -> None:
    adapters = runner._model.adapters
    fused = adapters._fuse("denoiser", adapters.settle(chosen))
    theirs = peer.fuse(recipe(loras=chosen))
    assert fused
    for name, weight in fused.items():
        expected = theirs[name.removeprefix("unet.")]
        error = (weight - expected).norm() / expected.norm()
        assert error <= 1e-5, (name, float(error))
    built = {n: p for n, p in theirs.items() if f"unet.{n}" not in fused and "lora_" not in n}
    for name, weight in built.items():
        if name.endswith(("conv1.weight", "to_q.weight")):
            assert torch.equal(runner._model.engines["denoiser"].weight(f"unet.{name}"), weight)


def test_a_prompt_is_encoded_anew_for_another_set(runner: Runner) -> None:
    plain = runner.start(recipe(prompt="one text"))
    runner.encode_text([plain])
    styled = runner.start(recipe(prompt="one text", loras={"both": 1.0}))
    assert not styled.text_encoded
    runner.encode_text([styled])
    assert plain.text_encoded
    assert styled.text_encoded
    ours, theirs = (each.conditioning["prompt_embeds"][0] for each in (plain, styled))
    assert not torch.equal(ours, theirs)
    assert plain.group != styled.group


def test_old_layout_means_the_same(loras: dict[str, Path], tmp_path: Path) -> None:
    """`lora.down` / `lora.up` with an α a layer, as tools before peft wrote them."""
    (file,) = loras["attention"].iterdir()
    peft = load_file(file)
    old = {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value
        for key, value in peft.items()
    }
    save_file(old, tmp_path / "old.safetensors")
    ours, theirs = read_lora(tmp_path / "old.safetensors"), read_lora(file)
    assert ours["denoiser"].keys() == theirs["denoiser"].keys()
    for name, pair in ours["denoiser"].items():
        assert torch.equal(pair.down, theirs["denoiser"][name].down)
        assert pair.scale == 1.0  # no α in the file: as the rank
        assert theirs["denoiser"][name].scale == 2.0  # from the file's metadata


def test_a_name_that_is_not_served(runner: Runner) -> None:
    with pytest.raises(InvalidInput, match="'other'; served with this model: attention, every"):
        runner.start(recipe(loras={"other": 1.0}))
    with pytest.raises(InvalidInput, match="use a number"):
        runner.start(recipe(loras={"both": float("nan")}))


def test_a_lora_of_another_model(
    checkpoints: Path, loras: dict[str, Path], cache_dir: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"LoRA '.*' .*changes unet.*another"):
        Runner.open(
            Order(str(checkpoints / "tiny-demo"), backend="torch", loras=loras, cache_dir=cache_dir)
        )


def test_files_that_are_no_plain_lora(loras: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        read_lora(tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors cannot be read"):
        read_lora(broken)
    (file,) = loras["attention"].iterdir()
    layers = load_file(file)
    first = next(key for key in layers if key.endswith("lora_A.weight"))
    dora = layers | {first.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(1)}
    save_file(dora, tmp_path / "dora.safetensors")
    with pytest.raises(CheckpointError, match=r"dora\.safetensors .*only plain pairs"):
        read_lora(tmp_path / "dora.safetensors")
    half = {key: value for key, value in layers.items() if key != first}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=f"but no {first} that goes with it"):
        read_lora(tmp_path / "half.safetensors")


def test_a_lora_fused_at_build_time_draws_as_one_switched_on(
    checkpoints: Path, cache_dir: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    chosen = {"both": 0.3, "everything": 1.2}
    fused = tuple((loras[name], weight) for name, weight in chosen.items())
    defaults = Defaults("lcm", guidance_scale=1.0, timesteps=(999, 499, 249))
    source = checkpoints / "tiny-sd"
    blueprint = Blueprint(source, loras=fused, defaults=defaults)
    bundle = build_bundle(blueprint, tmp_path / "fused", lambda *_: None, cache_dir)
    names = [entry["weight"] for entry in bundle.manifest["loras"]]
    assert names == list(chosen.values())
    built = Runner.open(Order(str(bundle.folder), num_threads=1))
    switched = Runner.open(Order(str(source), cache_dir=cache_dir, num_threads=1, loras=loras))
    info = built.info
    assert (info.default_sampler, info.default_num_steps) == ("lcm", 3)
    assert info.default_guidance_scale == 1.0
    assert info.default_timesteps == (999, 499, 249)
    (one,) = built.draw([built.default_recipe(3, "a cube", info.default_num_steps)])
    assert one.schedule.timesteps.tolist() == [999, 499, 249]
    same = dataclasses.replace(one.recipe, loras=chosen)
    (other,) = switched.draw([same])
    assert psnr_db(one.pixels, other.pixels) >= 50
    (plain,) = switched.draw([dataclasses.replace(same, loras={})])
    assert psnr_db(one.pixels, plain.pixels) < 50
    built.close()
    switched.close()
