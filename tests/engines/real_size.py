"""Checkpoints of real models' exact shapes, with random weights in fp16."""

from __future__ import annotations

import json
from pathlib import Path

from engines.build.source import ARCHITECTURES
from tests.engines.checkpoints import SCHEDULE, make_t5_tokenizer, make_tokenizer

# Of the published denoisers, to 0.1 %: LCM Dreamshaper v7 with its guidance embedding, SDXL base
# 1.0, PixArt-XL-2-1024-MS and its T5; of Stable Diffusion 1.5 and AnimateLCM's motion modules
# (1.67 GB of floats) the sum of both.
SD15_LCM_PARAMETERS = 859_600_000
SDXL_PARAMETERS = 2_567_000_000
PIXART_PARAMETERS = 611_300_000
T5_XXL_PARAMETERS = 4_762_000_000  # of the encoder
ANIMATELCM_PARAMETERS = 859_500_000 + 417_100_000


def make_sd15_lcm(folder: Path) -> None:
    """Write a random checkpoint with the configs of LCM Dreamshaper v7 (SD 1.5), in fp16."""
    import torch
    from diffusers import (
        AutoencoderKL,
        LatentConsistencyModelPipeline,
        LCMScheduler,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-vocabulary"), 77)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
            hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, time_cond_proj_dim=256,
    )  # fmt: skip
    count = sum(weight.numel() for weight in unet.parameters())
    assert abs(count - SD15_LCM_PARAMETERS) < 1e-3 * SD15_LCM_PARAMETERS, count
    vae = AutoencoderKL(
        sample_size=512, latent_channels=4, block_out_channels=(128, 256, 512, 512),
        layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    LatentConsistencyModelPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=LCMScheduler(**SCHEDULE), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def make_sdxl(folder: Path) -> None:
    """Write a random checkpoint with the configs of SDXL base 1.0 and LCM as its scheduler."""
    import torch
    from diffusers import (
        AutoencoderKL,
        LCMScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    base = ARCHITECTURES / "stable-diffusion-xl-base-1.0"
    first = make_tokenizer(folder.with_name(f"{folder.name}-vocabulary"), 77)
    second = make_tokenizer(folder.with_name(f"{folder.name}-vocabulary-2"), 77)
    second.pad_token = "!"  # its id is 0

    def text_config(name: str) -> CLIPTextConfig:
        values = json.loads((base / name / "config.json").read_text())
        return CLIPTextConfig.from_dict(values | {"eos_token_id": first.eos_token_id})

    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet"))
    count = sum(weight.numel() for weight in unet.parameters())
    assert abs(count - SDXL_PARAMETERS) < 1e-3 * SDXL_PARAMETERS, count
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(base / "vae")),
        text_encoder=CLIPTextModel(text_config("text_encoder")),
        text_encoder_2=CLIPTextModelWithProjection(text_config("text_encoder_2")),
        tokenizer=first, tokenizer_2=second, unet=unet,
        scheduler=LCMScheduler(**SCHEDULE), force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)  # fmt: skip


def make_pixart_whole(folder: Path) -> None:
    """Write a random checkpoint with the configs of PixArt-LCM-XL-2-1024-MS and its T5-XXL."""
    make_pixart(folder, num_layers=24)


def make_pixart(folder: Path, num_layers: int = 1) -> None:
    """As `make_pixart_whole`, with one layer of the 24 of its T5: plans of all need its 9.5 GB
    several times over, which no small machine has.
    """
    import torch
    from diffusers import AutoencoderKL, LCMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    text = T5EncoderModel(
        T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=num_layers,
            num_heads=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        sample_size=128, cross_attention_dim=1152, caption_channels=4096
    )
    published = {transformer: PIXART_PARAMETERS}
    if num_layers == 24:
        published[text] = T5_XXL_PARAMETERS
    for network, wanted in published.items():
        count = sum(weight.numel() for weight in network.parameters())
        assert abs(count - wanted) < 1e-3 * wanted, count
    base = ARCHITECTURES / "stable-diffusion-v1-5"  # its VAE is Stable Diffusion's
    PixArtAlphaPipeline(
        tokenizer=make_t5_tokenizer(), text_encoder=text, transformer=transformer,
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(base / "vae")),
        scheduler=LCMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    ).save_pretrained(folder)  # fmt: skip


def make_animatelcm(folder: Path) -> None:
    """Write a random checkpoint of Stable Diffusion 1.5 with motion modules shaped as AnimateLCM's
    (up to 32 frames, none in the middle), in fp16.
    """
    import torch
    from diffusers import (
        AnimateDiffPipeline,
        AutoencoderKL,
        LCMScheduler,
        MotionAdapter,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-vocabulary"), 77)
    base = ARCHITECTURES / "stable-diffusion-v1-5"
    values = json.loads((base / "text_encoder" / "config.json").read_text())
    config = CLIPTextConfig.from_dict(values | {"eos_token_id": tokenizer.eos_token_id})
    pipeline = AnimateDiffPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(base / "vae")),
        text_encoder=CLIPTextModel(config), tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet")),
        motion_adapter=MotionAdapter(use_motion_mid_block=False),
        scheduler=LCMScheduler(**SCHEDULE | {"beta_schedule": "linear"}),
    )  # fmt: skip
    count = sum(weight.numel() for weight in pipeline.unet.parameters())
    assert abs(count - ANIMATELCM_PARAMETERS) < 1e-3 * ANIMATELCM_PARAMETERS, count
    pipeline.register_modules(motion_adapter=None)  # its UNet has the modules
    pipeline.save_pretrained(folder)
