"""The fused networks against diffusers' own forward in float32, on a CPU: layout and order are the
same on a GPU, where kernels take the place of torch's (`test_kernels`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    MotionAdapter,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor

from engines.backends.fused import fuse, ops, refresh
from engines.backends.fused.unet import FusedUNet
from engines.families import animatediff, pixart
from engines.families.stable_diffusion import Denoiser
from engines.families.vae import TinyVaeEncoder, VaeDecoder, VaeEncoder
from engines.motion_unet import join

SIDES = [(16, 16), (13, 18)]  # the second is no multiple of what the UNet halves


def _unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 16, "block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8,
        "cross_attention_dim": 48, "attention_head_dim": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**{**sizes, **changes}).eval()


def _inputs(rows: int, columns: int, embedding: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    inputs = {
        "sample": torch.randn(3, 4, rows, columns), "timestep": torch.tensor([999.0, 499.0, 19.0]),
        "prompt_embeds": torch.randn(3, 7, 48), "coefficients": torch.rand(3, 7),
        "noise": torch.randn(3, 4, rows, columns),
        "previous": torch.randn(3, 4, rows, columns), "guidance": torch.tensor([1.0, 5.0, 1.0]),
        "uncond_index": torch.tensor([0, 2, 2]),
    }  # fmt: skip
    return inputs | ({"timestep_cond": torch.randn(3, embedding)} if embedding else {})


def _relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("side", SIDES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"time_cond_proj_dim": 32},  # an LCM
        {},
        {"use_linear_projection": True, "attention_head_dim": [2, 2, 4, 4]},  # SD 2.x
        {"layers_per_block": 1, "mid_block_type": None},  # distilled ones
        {"transformer_layers_per_block": [1, 2, 1, 1]},
    ],
    ids=["lcm", "sd1", "sd2", "small", "deep"],
)
@torch.no_grad()
def test_a_unet_draws_what_diffusers_draws(changes: dict[str, Any], side: tuple[int, int]) -> None:
    plain = Denoiser(_unet(**changes))
    fused = copy.deepcopy(plain)
    assert fuse(fused) == ""
    inputs = _inputs(*side, changes.get("time_cond_proj_dim", 0))
    for found, truth in zip(fused(**inputs), plain(**inputs), strict=True):
        assert _relative(found, truth) < 2e-6


POOLED = {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}


def _clips(**changes: Any) -> animatediff.Denoiser:
    layers = {name: changes.pop(name) for name in list(changes) if name.startswith("motion_")}
    adapter = MotionAdapter(
        block_out_channels=(32, 32, 64, 64), motion_layers_per_block=2, motion_norm_num_groups=8,
        motion_num_attention_heads=4, use_motion_mid_block=changes.pop("middle", False), **layers,
    )  # fmt: skip
    return animatediff.Denoiser(join(_unet(**changes), adapter))


def _clip_inputs(rows: int, columns: int, embedding: int = 0) -> dict[str, torch.Tensor]:
    inputs = _inputs(rows, columns, embedding)
    for name in ("sample", "noise", "previous"):
        inputs[name] = torch.randn(3, 4, 5, rows, columns)
    return inputs


@pytest.mark.parametrize("side", SIDES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"time_cond_proj_dim": 32},
        {"middle": True, "motion_transformer_layers_per_block": 2},  # AnimateDiff 1
        {"use_linear_projection": True, **POOLED},  # the demo's
    ],
    ids=["lcm", "middle", "pooled"],
)
@torch.no_grad()
def test_a_unet_of_clips_draws_what_diffusers_draws(
    changes: dict[str, Any], side: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "MAX_ROWS", 40)  # of 3 · 256 places in the largest
    plain = _clips(**changes)
    fused = copy.deepcopy(plain)
    assert fuse(fused) == ""
    assert type(fused.unet).__name__ == "FusedMotionUNet"
    inputs = _clip_inputs(*side, changes.get("time_cond_proj_dim", 0))
    for found, truth in zip(fused(**inputs), plain(**inputs), strict=True):
        assert _relative(found, truth) < 2e-6


def _pixart(**changes: Any) -> pixart.Denoiser:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 16, "num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 3,
        "cross_attention_dim": 48, "caption_channels": 24, "use_additional_conditions": False,
    }  # fmt: skip
    return pixart.Denoiser(PixArtTransformer2DModel(**{**sizes, **changes}).eval())


def _pixart_inputs(rows: int, columns: int, *, told: bool) -> dict[str, torch.Tensor]:
    inputs = _inputs(rows, columns, 0)
    inputs["prompt_embeds"] = torch.randn(3, 7, 24)
    inputs["prompt_attention_mask"] = (torch.arange(7) < torch.tensor([[1], [4], [7]])).long()
    size = {"resolution": torch.full((3, 2), 128.0), "aspect_ratio": torch.ones(3, 1)}
    return inputs | (size if told else {})


@pytest.mark.parametrize("side", [(16, 16), (14, 18)], ids=str)
@pytest.mark.parametrize("told", [False, True], ids=["sigma", "told its size"])
@torch.no_grad()
def test_a_transformer_draws_what_diffusers_draws(told: bool, side: tuple[int, int]) -> None:
    plain = _pixart(use_additional_conditions=told)
    fused = copy.deepcopy(plain)
    assert fuse(fused) == ""
    assert type(fused.transformer).__name__ == "FusedPixArt"
    inputs = _pixart_inputs(*side, told=told)
    for found, truth in zip(fused(**inputs), plain(**inputs), strict=True):
        assert _relative(found, truth) < 2e-6


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(_clips, _clip_inputs(16, 16)), (_pixart, _pixart_inputs(16, 16, told=False))],
    ids=["clips", "pixart"],
)
@torch.no_grad()
def test_in_halves_as_well(
    make: Callable[[], torch.nn.Module], inputs: dict[str, torch.Tensor]
) -> None:
    """By torch's own kernels, as on a GPU without Triton: as far off as diffusers' forward."""
    truth, plain, fused = make()(**inputs)[1], make().to(torch.bfloat16), make().to(torch.bfloat16)
    assert fuse(fused) == ""
    assert _relative(fused(**inputs)[1], truth) < 1.2 * _relative(plain(**inputs)[1], truth)


def _vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "block_out_channels": (32, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    return AutoencoderKL(**{**sizes, **changes}).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
    ],
    ids=["sd1", "no quantising", "no attention"],
)
@torch.no_grad()
def test_a_vae_codes_what_diffusers_codes(changes: dict[str, Any]) -> None:
    vae = _vae(**changes)
    decoder, encoder = VaeDecoder(copy.deepcopy(vae)), VaeEncoder(copy.deepcopy(vae))
    assert fuse(decoder) == ""
    assert fuse(encoder) == ""
    latents = torch.randn(2, 4, 8, 9)
    found = decoder.vae.decode(latents, return_dict=False)[0]
    assert _relative(found, vae.decode(latents).sample) < 1e-5
    pixels = torch.randint(0, 255, (2, 64, 72, 3), dtype=torch.uint8)
    for ours, theirs in zip(encoder(pixels), VaeEncoder(vae)(pixels), strict=True):
        assert _relative(ours, theirs) < 2e-6


@torch.no_grad()
def test_a_tiny_vae_codes_what_diffusers_codes() -> None:
    torch.manual_seed(0)
    channels = (32, 32, 32, 32)
    vae = AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        num_decoder_blocks=(2, 1, 1, 1),
    ).eval()  # fmt: skip
    decoder, encoder = VaeDecoder(copy.deepcopy(vae)), TinyVaeEncoder(copy.deepcopy(vae))
    assert (fuse(decoder), fuse(encoder)) == ("", "")
    latents = 4 * torch.randn(2, 4, 8, 9)  # beyond where it bends them
    found = decoder.vae.decode(latents, return_dict=False)[0]
    assert _relative(found, vae.decode(latents).sample) < 2e-6
    pixels = torch.randint(0, 255, (2, 64, 72, 3), dtype=torch.uint8)
    assert _relative(encoder(pixels), TinyVaeEncoder(vae)(pixels)) < 2e-6


@torch.no_grad()
def test_sdxl_adds_a_pooled_prompt_and_sizes_to_the_time() -> None:
    plain = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8, use_linear_projection=True,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    )  # fmt: skip
    inputs = _inputs(16, 16, 0)
    given = [inputs[name] for name in ("sample", "timestep", "prompt_embeds")]
    added = {"text_embeds": torch.randn(3, 24), "time_ids": torch.rand(3, 6) * 1024}
    truth = plain(*given, added_cond_kwargs=added, return_dict=False)[0]
    fused = FusedUNet(plain.to(memory_format=torch.channels_last))
    found = fused(*given, added_cond_kwargs=added)[0]
    assert _relative(found, truth) < 2e-6


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: Denoiser(_unet(time_cond_proj_dim=32)), _inputs(16, 16, 32)),
        (_clips, _clip_inputs(16, 16)),
        (_pixart, _pixart_inputs(16, 16, told=False)),
    ],
    ids=["pictures", "clips", "pixart"],
)
@torch.no_grad()
def test_weights_changed_in_place_are_followed_wherever_they_went(
    make: Callable[[], torch.nn.Module], inputs: dict[str, torch.Tensor]
) -> None:
    """Every one of them: into fused products, views and what is made of upsampling weights."""
    plain = make()
    fused = copy.deepcopy(plain)
    named = dict(fused.named_parameters())
    assert fuse(fused) == ""
    before = fused(**inputs)[0]
    for name, parameter in plain.named_parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
        named[name].copy_(parameter)
    refresh(fused)
    truth = plain(**inputs)[0]
    assert _relative(before, truth) > 0.01
    assert _relative(fused(**inputs)[0], truth) < 2e-6


@torch.no_grad()
def test_what_is_not_known_draws_by_its_own_forward(caplog: pytest.LogCaptureFixture) -> None:
    """Never a wrong picture: each of these has a layout of its own."""
    for changes, reason in [
        ({"resnet_time_scale_shift": "scale_shift"}, "scale_shift"),
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"act_fn": "gelu"}, "GELU"),
        ({"class_embed_type": "timestep"}, "class_embedding"),
        ({"center_input_sample": True}, "centred"),
    ]:
        plain = Denoiser(_unet(**changes))
        fused = copy.deepcopy(plain)
        assert reason in fuse(fused)
        assert isinstance(fused.unet, UNet2DConditionModel)
        assert reason in caplog.text
    unet = _unet()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert "s1" in fuse(Denoiser(unet))
    unet = _unet()
    unet.set_attn_processor(AttnProcessor())
    assert "AttnProcessor" in fuse(Denoiser(unet))
    unet = _unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.scale = 1.0
    assert "scale" in fuse(Denoiser(unet))
    clips = _clips()
    clips.unet.down_blocks[0].motion_modules[0].transformer_blocks[0].only_cross_attention = True
    assert "only_cross_attention" in fuse(clips)
    assert "approximate" in fuse(_pixart(activation_fn="gelu"))
    assert "weight" in fuse(_pixart(norm_elementwise_affine=True))
