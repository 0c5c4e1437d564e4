"""A motion adapter over a checkpoint of pictures is the checkpoint of clips, in whatever layout."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel
from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.build.bundle import Blueprint
from engines.build.checkpoint import load_facts, load_pipeline
from engines.build.source import Overrides, find_overrides
from engines.errors import CheckpointError
from engines.loras.file import read_lora
from engines.motion_unet import join
from tests.engines.checkpoints import make_checkpoint, make_lora, make_motion_adapter
from tests.engines.ldm import checkpoint_state
from tests.engines.peers import draw_together, open_runner, recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _as_original(adapter: Path) -> dict[str, Tensor]:
    """The adapter under the names of AnimateDiff's own repository."""
    renamed = {
        ".transformer_blocks.": ".temporal_transformer.transformer_blocks.",
        ".pos_embed.pe": ".attention_blocks.0.pos_encoder.pe",
        ".attn1.": ".attention_blocks.0.", ".attn2.": ".attention_blocks.1.",
        ".norm1.": ".norms.0.", ".norm2.": ".norms.1.", ".norm3.": ".ff_norm.",
    }  # fmt: skip
    renamed |= {f".{own}.": f".temporal_transformer.{own}." for own in ("proj_in", "proj_out")}
    state = {}
    for key, value in load_file(adapter / WEIGHTS).items():
        name = key
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        if name.count(".") == 5:  # down_blocks.0.motion_modules.0.norm.weight
            name = name.replace(".norm.", ".temporal_transformer.norm.")
        state[name] = value
    back = convert_animatediff_checkpoint_to_diffusers(state)
    own = {key for key in load_file(adapter / WEIGHTS) if not key.endswith(".pe")}
    assert back.keys() == own
    return state


@pytest.mark.parametrize("layout", ["folder", "pipeline", "file", "original"])
def test_a_checkpoint_with_an_adapter_is_the_folder(
    layout: str, tiny_motion: Path, tiny_clips: Path, checkpoints: Path, tmp_path: Path
) -> None:
    pictures, given = checkpoints / "tiny-sd", tiny_motion
    if layout == "pipeline":
        given = tiny_clips
    elif layout == "file":
        given = tiny_motion / WEIGHTS
    elif layout == "original":
        given = tmp_path / "mm.safetensors"
        save_file(_as_original(tiny_motion), given)
    overrides = find_overrides(None, None, None, motion_adapter=str(given))
    ours, theirs = load_pipeline(pictures, "fp32", overrides), load_pipeline(tiny_clips, "fp32")
    expected = theirs.unet.state_dict()
    assert {*ours.unet.state_dict()} == {*expected}
    for key, weight in ours.unet.state_dict().items():
        assert torch.equal(weight, expected[key]), key
    found = load_facts(pictures, ours, overrides)
    kin = load_facts(tiny_clips, theirs)
    assert found.components.keys() == {"motion_adapter"}
    assert found.scheduler["beta_schedule"] == kin.scheduler["beta_schedule"] == "linear"
    own = ("name", "components", "scheduler", "default_sampler", "default_num_steps",
           "default_guidance_scale")  # fmt: skip
    alike = {name: getattr(kin, name) for name in own}
    assert dataclasses.replace(found, **alike) == kin


def test_clips_are_those_of_the_folder(
    tiny_motion: Path, tiny_clips: Path, checkpoints: Path, cache_dir: Path
) -> None:
    moving = {"motion_adapter": str(tiny_motion)}
    clips = []
    for checkpoint, order in ((checkpoints / "tiny-sd", moving), (tiny_clips, {})):
        runner = open_runner(checkpoint, "torch", cache_dir, **order)
        (drawn,) = draw_together(runner, [recipe(num_frames=3, guidance_scale=1.5)])
        clips.append(drawn)
        runner.close()
    assert (clips[0].latents == clips[1].latents).all()
    assert (clips[0].pixels == clips[1].pixels).all()


def test_over_a_single_file(
    tiny_motion: Path, tiny_clips: Path, checkpoints: Path, tmp_path: Path
) -> None:
    pictures = checkpoints / "tiny-sd"
    file = tmp_path / "pictures.safetensors"
    state = checkpoint_state(load_pipeline(pictures, "fp32"))
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    overrides = Overrides({"motion_adapter": tiny_motion}, architecture=pictures)
    ours, theirs = load_pipeline(file, "fp32", overrides), load_pipeline(tiny_clips, "fp32")
    expected = theirs.unet.state_dict()
    assert all(torch.equal(w, expected[key]) for key, w in ours.unet.state_dict().items())


def test_another_unet_or_adapter_of_a_folder(
    tiny_motion: Path, tiny_clips: Path, checkpoints: Path, tmp_path: Path
) -> None:
    """Each in place of its own; the other stays."""
    longer = make_motion_adapter(  # and without a module in the middle, as AnimateLCM's
        tmp_path / "longer", motion_max_seq_length=12, use_motion_mid_block=False
    )
    before = load_pipeline(tiny_clips, "fp32").unet
    with_longer = load_pipeline(tiny_clips, "fp32", Overrides({"motion_adapter": longer})).unet
    assert with_longer.config.motion_max_seq_length == 12
    assert not any(".motion" in key for key in with_longer.mid_block.state_dict())
    weights = Overrides({"motion_adapter": longer / WEIGHTS})
    as_file = load_pipeline(tiny_clips, "fp32", weights).unet
    state = as_file.state_dict()
    assert state.keys() == with_longer.state_dict().keys()
    assert all(torch.equal(state[key], w) for key, w in with_longer.state_dict().items())
    another = Overrides({"unet": checkpoints / "tiny-v" / "unet"})
    with_unet = load_pipeline(tiny_clips, "fp32", another)
    for found in (with_longer, with_unet.unet):
        assert type(found) is UNetMotionModel
        assert torch.equal(found.conv_out.weight, before.conv_out.weight)  # of one seed all
        module, own = (unet.down_blocks[1].motion_modules[0] for unet in (found, before))
        assert torch.equal(module.proj_in.weight, own.proj_in.weight)


def test_what_the_unet_of_clips_of_diffusers_has_no_room_for(checkpoints: Path) -> None:
    """Guidance embedding, pooled text, norms that are scaled and shifted: a module without effect
    leaves each frame what the UNet of pictures makes of it.
    """
    unet, pictures = (load_pipeline(checkpoints / "tiny-demo", "fp32").unet for _ in range(2))
    adapter = MotionAdapter(
        block_out_channels=(32, 64, 64), motion_layers_per_block=1, motion_norm_num_groups=8,
        motion_max_seq_length=4,
    )  # fmt: skip
    for name, weight in adapter.named_parameters():
        if ".proj_out." in name:
            torch.nn.init.zeros_(weight)
    clips = join(unet, adapter)
    sample, embeds = torch.randn(2, 4, 3, 16, 16), torch.randn(2, 16, 32)
    timesteps, cond = torch.tensor([999, 19]), torch.randn(2, 32)
    with torch.no_grad():
        found = clips(sample, timesteps, embeds.repeat_interleave(3, 0), timestep_cond=cond).sample
        for frame in range(3):
            expected = pictures(sample[:, :, frame], timesteps, embeds, timestep_cond=cond).sample
            assert torch.allclose(found[:, :, frame], expected, atol=1e-5)


def test_it_is_in_the_bundles_key(tiny_motion: Path, checkpoints: Path) -> None:
    plain = Blueprint(checkpoints / "tiny-sd")
    moving = dataclasses.replace(plain, overrides=Overrides({"motion_adapter": tiny_motion}))
    assert plain.key != moving.key
    assert moving.beside["motion_adapter"][0] == "tiny-motion"


def _halved(adapter: Path, folder: Path) -> Path:
    """A file that lacks a weight."""
    state = load_file(adapter / WEIGHTS)
    state.pop("mid_block.motion_modules.0.proj_out.bias")
    folder.mkdir(parents=True)
    save_file(state, folder / "half.safetensors")
    return folder / "half.safetensors"


def _lora(checkpoints: Path, folder: Path) -> Path:
    return make_lora(checkpoints / "tiny-sd", folder, ["to_q"]) / "pytorch_lora_weights.safetensors"


def _another(folder: Path, **config: Any) -> Path:
    made = make_motion_adapter(folder, **config)
    assert MotionAdapter.load_config(made)["_class_name"] == "MotionAdapter"
    return made


def test_what_is_refused(tiny_motion: Path, checkpoints: Path, tmp_path: Path) -> None:
    base, file = checkpoints / "tiny-sd", tiny_motion / WEIGHTS
    half = _halved(tiny_motion, tmp_path / "h")
    inpainting = make_checkpoint(tmp_path / "inpainting", lcm=False, inpainting=True)
    shallow = _another(tmp_path / "shallow", channels=(32,))
    deep = _another(tmp_path / "deep", motion_layers_per_block=2)
    pia = _another(tmp_path / "pia", conv_in_channels=9)
    cases: list[tuple[Path, dict[str, Path], str]] = [
        (base, {"motion_adapter": shallow}, "blocks of 32 channels with 1 layers, this model's has "
         "blocks of 32, 64 channels with 1, 1 layers: use one made for it"),
        (base, {"motion_adapter": deep}, "32, 64 channels with 2, 2 layers, this model's"),
        (base, {"motion_adapter": pia}, "is PIA's"),
        (base, {"motion_adapter": half}, "proj_out.bias is missing"),
        (base, {"motion_adapter": _lora(checkpoints, tmp_path / "lora")},
         "is a LoRA, not a motion adapter: give it by --lora"),
        (base, {"motion_adapter": base / "unet"}, "is of class 'UNet2DConditionModel'"),
        (base, {"motion_adapter": base / "unet" / WEIGHTS},
         "is a UNet alone, not a motion adapter: give it by --unet"),
        (base, {"unet": file}, "is a motion adapter, not a UNet: give it by --motion-adapter FILE"),
        (base, {"unet": tiny_motion}, "is of class 'MotionAdapter'.*: give it by --motion-adapter"),
        (base, {"vae": file}, "is a motion adapter, not a VAE: give it by --motion-adapter FILE"),
        (file, {}, "is a motion adapter, not a whole checkpoint: give it by --motion-adapter FILE"),
        (checkpoints / "tiny-lcm", {"motion_adapter": tiny_motion}, "with a guidance embedding"),
        (inpainting, {"motion_adapter": tiny_motion}, "UNet with 9 input channels"),
    ]  # fmt: skip
    for source, components, message in cases:
        overrides = Overrides(components)
        with pytest.raises(CheckpointError, match=message):
            load_facts(source, load_pipeline(source, "fp32", overrides), overrides)
    for lora in (file, tiny_motion):
        with pytest.raises(CheckpointError, match="is a motion adapter, not a LoRA, give it by"):
            read_lora(lora)


def test_a_folder_without_an_adapter(tiny_clips: Path, checkpoints: Path, tmp_path: Path) -> None:
    """As diffusers saves one whose UNet has the modules; with a UNet of pictures it lacks them."""
    alone = Path(shutil.copytree(tiny_clips, tmp_path / "alone"))
    shutil.rmtree(alone / "motion_adapter")
    index = json.loads((alone / "model_index.json").read_text())
    index["motion_adapter"] = [None, None]
    (alone / "model_index.json").write_text(json.dumps(index))
    expected = load_pipeline(tiny_clips, "fp32").unet.state_dict()
    found = load_pipeline(alone, "fp32").unet.state_dict()
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    unet = Overrides({"unet": checkpoints / "tiny-v" / "unet"})
    with pytest.raises(CheckpointError, match=r"MotionAdapter: give one by --motion-adapter"):
        load_pipeline(alone, "fp32", unet)
