"""Real architectures with random weights, made on the device on the spot: no checkpoint is needed.

Times and FLOP/s depend on shapes, not on what the weights say. `SD15` is LCM Dreamshaper v7's
architecture; `TINY` walks the same way on a CPU in seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from engines.backends.adapters import Adapters
from engines.backends.choice import Choice
from engines.backends.engine import Engine
from engines.build.checkpoint import tokenizer_of
from engines.drawing.model import Model
from engines.drawing.runner import Runner
from engines.facts import Facts
from engines.families import stable_diffusion
from engines.families.part import Part
from loadtests.peak import DTYPES
from loadtests.torch_flops import count_part_flops

TOKENIZER = Path(__file__).parents[2] / "engines" / "demo" / "demo-lcm" / "tokenizer"
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MAX_TOKENS = 77


@dataclass(frozen=True)
class Shape:
    """An architecture, as far as it differs from SD 1.5's."""

    name: str
    precision: str
    side: int  # of the latents
    width: int = 768  # of a token's embedding
    text_layers: int = 12
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    tiny_decoder: bool = False  # TAESD's architecture instead of the autoencoder's

    @property
    def size_px(self) -> int:
        return 8 * self.side


SD15 = Shape("SD 1.5 LCM", "fp16", 64)
TINY = Shape(
    "tiny", "fp32", 8, width=32, text_layers=1,
    unet={
        "block_out_channels": (32, 32), "norm_num_groups": 8, "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    vae={"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1},
)  # fmt: skip
VAE: Mapping[str, Any] = {
    "latent_channels": 4, "layers_per_block": 2, "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def shape_for(device: str) -> Shape:
    return SD15 if device == "cuda" else TINY


def with_tiny_decoder(shape: Shape) -> Shape:
    return dataclasses.replace(shape, name=f"{shape.name}, tiny decoder", tiny_decoder=True)


def make_pipeline(shape: Shape, device: str) -> Any:
    """The components of a LatentConsistencyModelPipeline, by their names there."""
    from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, model_max_length=MAX_TOKENS)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=shape.width, intermediate_size=4 * shape.width,
        num_attention_heads=shape.width // 16 if shape.width < 64 else shape.width // 64,
        num_hidden_layers=shape.text_layers, max_position_embeddings=MAX_TOKENS,
        projection_dim=shape.width, hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[shape.precision])
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(
                sample_size=shape.side, cross_attention_dim=shape.width, attention_head_dim=8,
                **{"time_cond_proj_dim": 256, **shape.unet},
            )  # fmt: skip
            if shape.tiny_decoder:
                vae: torch.nn.Module = AutoencoderTiny()
            else:
                vae = AutoencoderKL(sample_size=shape.size_px, **{**VAE, **shape.vae})
            text_encoder = CLIPTextModel(text)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in (unet, vae, text_encoder):
        module.eval().requires_grad_(False)
    scheduler = LCMScheduler(**SCHEDULE, clip_sample=False)
    return SimpleNamespace(
        unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
    )


def save_checkpoint(shape: Shape, device: str, folder: Path) -> None:
    """A random checkpoint in diffusers' folder format, as `fourstep serve --model` takes it."""
    from diffusers import LatentConsistencyModelPipeline

    pipeline = LatentConsistencyModelPipeline(
        **vars(make_pipeline(shape, device)), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)


def parts_of(pipeline: Any, shape: Shape) -> list[Part]:
    """What text-to-image runs: the vae_encoder is left out."""
    parts = stable_diffusion.parts(pipeline, stable_diffusion.facts(shape.name, pipeline, {}))
    return [part for part in parts if part.name != "vae_encoder"]


def open_runner(
    shape: Shape, device: str, engine: Callable[[Part, str], Engine], max_batch: int
) -> tuple[Runner, dict[str, Engine]]:
    """The product's own runner over a fresh random model, and the engines under it by part."""
    pipeline = make_pipeline(shape, device)
    engines = {part.name: engine(part, device) for part in parts_of(pipeline, shape)}
    facts = stable_diffusion.facts(shape.name, pipeline, {})
    model = make_model(facts, tokenizer_of(pipeline), engines, shape.precision, device)
    return Runner(model, max_batch=max_batch), engines


def make_model(
    facts: Facts, tokenizer: Tokenizer, engines: Mapping[str, Engine], precision: str, device: str
) -> Model:
    """Of engines that are there already, with one tokenizer and no LoRAs."""
    return Model(
        facts=facts,
        tokenizers={"tokenizer": tokenizer},
        engines=engines,
        adapters=Adapters({}, engines),
        choice=Choice("torch", "measured"),
        precision=precision,
        device=device,
    )


class Counts(NamedTuple):
    """FLOP of one row: its text, one denoise step, its decoding."""

    text: int
    step: int
    decode: int

    def image(self, num_steps: int) -> int:
        """Without its text, whose embedding is cached."""
        return num_steps * self.step + self.decode


def count_shape(shape: Shape) -> Counts:
    """Counted by torch on the meta device, where the largest model costs nothing."""
    parts = {part.name: part for part in parts_of(make_pipeline(shape, "meta"), shape)}
    sizes = {"batch": 1, "rows": shape.side, "columns": shape.side}
    return Counts(
        *(
            count_part_flops(parts[name], sizes)
            for name in ("text_encoder", "denoiser", "vae_decoder")
        )
    )
