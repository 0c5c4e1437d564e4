"""Tiny random checkpoints in diffusers' own folder format: real components, no meaning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

MAX_TOKENS = 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_tokenizer(folder: Path, max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """Byte-level CLIP tokenizer with no merges: any Unicode text becomes bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocab), str(merges), model_max_length=max_tokens)


def make_checkpoint(
    folder: Path,
    *,
    lcm: bool,
    prediction_type: str = "epsilon",
    three_levels: bool = False,
    inpainting: bool = False,
) -> Path:
    """Write a tiny Stable Diffusion (or LCM, with guidance embedding) checkpoint to ``folder``.

    ``three_levels`` gives the UNet the demo models' build: two halvings, so that sides of 8 n + 1
    and 16 n + 1 latents are odd at both, and the prompt pooled into the time embedding.
    ``inpainting`` gives it 9 channels: it takes a mask and what that leaves.
    """
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "raw_tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=MAX_TOKENS, projection_dim=32,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    num_deep = 2 if three_levels else 1
    pooled = {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    pooled |= {"resnet_time_scale_shift": "scale_shift"}
    unet = UNet2DConditionModel(
        sample_size=16 if three_levels else 8, in_channels=9 if inpainting else 4, out_channels=4,
        block_out_channels=(32, 64, 64)[: 1 + num_deep], layers_per_block=1,
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * num_deep),
        up_block_types=(*("CrossAttnUpBlock2D",) * num_deep, "UpBlock2D"),
        time_cond_proj_dim=32 if lcm else None, **(pooled if three_levels else {}),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64, latent_channels=4,
    )  # fmt: skip
    options = SCHEDULE | {"prediction_type": prediction_type, "clip_sample": False}
    parts = {
        "vae": vae, "text_encoder": text, "tokenizer": tokenizer, "unet": unet,
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    if lcm:
        pipeline = LatentConsistencyModelPipeline(scheduler=LCMScheduler(**options), **parts)
    else:
        scheduler = DDIMScheduler(**options, set_alpha_to_one=False, steps_offset=1)
        kind = StableDiffusionInpaintPipeline if inpainting else StableDiffusionPipeline
        pipeline = kind(scheduler=scheduler, **parts)
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_vae(folder: Path, latent_channels: int = 4) -> Path:
    """Write a small random `AutoencoderTiny` with a scaling factor of its own."""
    torch.manual_seed(2)
    channels = {f"{part}_block_out_channels": (8, 8, 8, 8) for part in ("encoder", "decoder")}
    vae = AutoencoderTiny(**channels, latent_channels=latent_channels, scaling_factor=0.7)
    vae.save_pretrained(folder)
    return folder


def make_xl_checkpoint(
    folder: Path, *, pruned: bool = False, embedding: bool = False, inpainting: bool = False
) -> Path:
    """Write a tiny SDXL checkpoint; ``pruned`` as SSD-1B is, whose ways down and up differ and
    whose middle has no attention; ``embedding`` with the LCM guidance embedding;
    ``inpainting`` with 9 channels.
    """
    torch.manual_seed(1)
    tokenizer = make_tokenizer(folder / "raw_tokenizer")
    size = {
        "vocab_size": len(tokenizer), "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(**size, hidden_size=32, pad_token_id=1))
    text_2 = CLIPTextModelWithProjection(
        CLIPTextConfig(**size, hidden_size=40, projection_dim=24, pad_token_id=0)
    )
    second = make_tokenizer(folder / "raw_tokenizer_2")
    second.pad_token = "!"  # as SDXL's second has: its id is 0
    blocks: dict[str, Any] = {"transformer_layers_per_block": (1, 2)}
    if pruned:
        blocks = {
            "transformer_layers_per_block": [1, [2, 1]],
            "reverse_transformer_layers_per_block": [[3, 1, 2], 1],
            "mid_block_type": "UNetMidBlock2D",
        }
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=9 if inpainting else 4, out_channels=4,
        block_out_channels=(32, 64), layers_per_block=2,
        cross_attention_dim=72, attention_head_dim=(4, 8), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        time_cond_proj_dim=32 if embedding else None, **blocks,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64, latent_channels=4, scaling_factor=0.13025, force_upcast=True,
    )  # fmt: skip
    kind = StableDiffusionXLInpaintPipeline if inpainting else StableDiffusionXLPipeline
    pipeline = kind(
        vae=vae, text_encoder=text, text_encoder_2=text_2, tokenizer=tokenizer,
        tokenizer_2=second, unet=unet, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    file = folder / "scheduler" / "scheduler_config.json"  # SDXL's names what other classes take
    others = {"clip_sample": False, "set_alpha_to_one": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | others))
    return folder


def make_motion_adapter(folder: Path, channels: tuple[int, ...] = (32, 64), **more: Any) -> Path:
    """Write a random motion adapter for `make_checkpoint`'s UNet, of up to eight frames."""
    torch.manual_seed(3)
    options = {"motion_layers_per_block": 1, "motion_max_seq_length": 8} | more
    adapter = MotionAdapter(block_out_channels=channels, **options)
    adapter.save_pretrained(folder)
    return folder


def make_animatediff_checkpoint(folder: Path, base: Path, adapter: Path) -> Path:
    """Write AnimateDiff's pipeline of a Stable Diffusion checkpoint and a motion adapter, LCM on
    linear betas, as AnimateLCM is used.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline = AnimateDiffPipeline(
        vae=pipeline.vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer,
        unet=pipeline.unet, motion_adapter=MotionAdapter.from_pretrained(adapter),
        scheduler=LCMScheduler.from_config(pipeline.scheduler.config, beta_schedule="linear"),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def make_t5_tokenizer() -> T5Tokenizer:
    """A vocabulary of single letters."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*marks, *letters], extra_ids=0, additional_special_tokens=[])


def make_pixart_checkpoint(
    folder: Path, *, sample_size: int = 32, sigma: bool = False, learned_variance: bool = True,
    told: bool = False,
) -> Path:  # fmt: skip
    """Write a tiny PixArt-δ checkpoint (``sigma``: PixArt-Σ). Of a ``sample_size`` of 128, or
    where it is ``told``, it is told the size that is drawn, but in Σ.
    """
    torch.manual_seed(2)
    tokenizer = make_t5_tokenizer()
    text = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=8 if learned_variance else 4, num_layers=2, cross_attention_dim=24,
        sample_size=sample_size, caption_channels=32,
        use_additional_conditions=False if sigma else told or None,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64, latent_channels=4,
    )  # fmt: skip
    kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    pipeline = kind(
        tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=transformer,
        # PixArt's own betas leave so little signal that latents of random weights reach hundreds,
        # whose last bits are more than the tests allow.
        scheduler=LCMScheduler(**SCHEDULE, clip_sample=False),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def with_scheduler(config: dict[str, Any], checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint that names another scheduler."""
    shutil.copytree(checkpoint, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_lora(
    checkpoint: Path, folder: Path, targets: list[str], *, text_encoder: bool = False, rank: int = 4
) -> Path:
    """Write random pairs for the UNet's ``targets``, by diffusers' own `save_lora_weights`."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(len(targets))
    pipeline = DiffusionPipeline.from_pretrained(checkpoint)
    models = {"unet": (pipeline.unet, targets)}
    if text_encoder:
        models["text_encoder"] = (pipeline.text_encoder, ["q_proj", "v_proj"])
    layers = {}
    for kind, (model, modules) in models.items():
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=modules, init_lora_weights=False
        )
        model.add_adapter(config)
        layers[f"{kind}_lora_layers"] = get_peft_model_state_dict(model)
        layers[f"{kind}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder


def as_kohya(layers: Mapping[str, Tensor], factor: float = 4.0) -> dict[str, Tensor]:
    """Layers under peft's names as kohya has them: `up` times the factor, α = rank / factor."""
    state = {}
    for key, down in layers.items():
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removesuffix(".lora_A.weight")
        part, _, name = layer.partition(".")
        if part == "text_encoder" and not name.startswith("text_model."):
            name = f"text_model.{name}"
        base = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + name.replace(".", "_")
        state[f"{base}.lora_down.weight"] = down
        state[f"{base}.lora_up.weight"] = layers[f"{layer}.lora_B.weight"] * factor
        state[f"{base}.alpha"] = torch.tensor(down.shape[0] / factor)
    return state
