"""The demo models' networks: real diffusers and transformers classes, small ones.

Owns every architecture choice, each with its reason. Trains nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

SIZE_PX = 128
LATENT_CHANNELS = 4
VAE_SCALE_FACTOR = 8
TEXT_WIDTH = 96
UNET_CHANNELS, UNET_GROUPS = (48, 96, 128), 16
MOTION_HEADS = 1
GUIDANCE_WIDTH = 64  # of the guidance embedding w: `time_cond_proj_dim`

# Stable Diffusion's own noise schedule. With v prediction, because a one-step sample starts at
# almost pure noise, where x0 from a predicted epsilon multiplies the network's error by 15.
NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_vae() -> Any:
    """AutoencoderKL, 0.94 M parameters: 8 times smaller latents of 4 channels, no attention."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
        sample_size=SIZE_PX,
    )


def build_tiny_vae() -> Any:
    """AutoencoderTiny, 0.16 M parameters, of which the decoder has 0.1 M.

    Sixteen channels fill the vectors of a CPU: with 24 or 32 a decode took as long as the full one.
    Blocks at the three small sizes cost next to nothing beside the one at the picture's.
    """
    return AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4,
        decoder_block_out_channels=(16,) * 4,
        num_encoder_blocks=(1, 2, 2, 2),
        num_decoder_blocks=(4, 4, 4, 1),
        latent_channels=LATENT_CHANNELS,
    )


def build_text_encoder(tokenizer: Any) -> Any:
    """CLIPTextModel, 0.3 M parameters: two layers read a caption of the picture world."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(*, guidance_embedding: bool) -> Any:
    """UNet2DConditionModel, 5.3 M parameters, with or without LCM's guidance embedding.

    Two halvings, to 4 x 4 at 128 px: convolutions know where they are from the border alone, and
    with one halving the objects' places and shapes were not learnt in 10,000 steps. Beside the
    cross-attention, the prompt is pooled into the time embedding (`addition_embed_type` text, as
    in DeepFloyd IF): without it such a UNet learnt the background's colour and no more.
    """
    return UNet2DConditionModel(
        sample_size=SIZE_PX // VAE_SCALE_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=UNET_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=UNET_GROUPS,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
        time_cond_proj_dim=GUIDANCE_WIDTH if guidance_embedding else None,
    )


def build_motion_adapter(max_frames: int) -> Any:
    """MotionAdapter for `build_unet`, 2.2 M parameters: frames know of each other at every level.

    It begins without effect, as AnimateDiff's does (``zero_initialize``): each frame is a picture.
    The first attention of each module begins by looking at its own frame: from small random
    weights, which look at all frames alike, little tells one frame from another.
    """
    adapter = MotionAdapter(
        block_out_channels=UNET_CHANNELS,
        motion_layers_per_block=1,
        motion_num_attention_heads=MOTION_HEADS,
        motion_norm_num_groups=UNET_GROUPS,
        motion_max_seq_length=max_frames,
    )
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:
            torch.nn.init.zeros_(parameter)
        elif ".attn1." in name and name.endswith("weight"):
            torch.nn.init.eye_(parameter)
    return adapter


def prepare_for_training(unet: Any, device: torch.device) -> Any:
    """Choose the layout and the attention that train fastest: in place, and returned.

    On a CPU of November 2026 (2 cores, bfloat16) plain attention and channels-last made a step of
    this UNet 1.6 times as fast as fused attention, whose backward pass is slow there.
    """
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
    return unet.to(device=device, memory_format=torch.channels_last)


def noise_schedule() -> Any:
    """The teacher's DDIMScheduler."""
    return DDIMScheduler(**NOISE)
