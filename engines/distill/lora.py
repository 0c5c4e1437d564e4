"""LoRAs on the teacher, through peft: adding, styles' training (stages 8 and 9), saving.

Files are written by diffusers' own `save_lora_weights`, so that any of its pipelines loads them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from engines.distill.base import LatentData, denoising_loss
from engines.distill.networks import prepare_for_training
from engines.distill.training import Course, Place, train

STYLE_COURSE = Course(
    num_steps=500, batch_size=64, learning_rate=2e-3, warmup_steps=20, average=0.98
)
STYLE_RANK = 8
# Every linear and convolution of the blocks, as diffusers' LCM-LoRA distillation script.
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
    "time_emb_proj",
)  # fmt: skip


def add_lora(unet: Any, rank: int) -> list[nn.Parameter]:
    """Freeze the UNet, add a LoRA of this rank to it and return the LoRA's parameters."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
    return [p for p in unet.parameters() if p.requires_grad]


def save_lora(unet: Any, folder: Path) -> None:
    """Write the UNet's LoRA as float16 `pytorch_lora_weights.safetensors` in ``folder``."""
    layers = get_peft_model_state_dict(unet)  # peft's names, which every diffusers >= 0.22 reads
    halves = {name: tensor.half().contiguous() for name, tensor in layers.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=halves)


def train_style(
    style: str, course: Course, place: Place, data: LatentData, encoder: Any, teacher: Any
) -> Any:
    """Fine-tune a LoRA on pictures of one style; returns the teacher's copy that carries it."""
    torch.manual_seed(place.seed)
    unet = prepare_for_training(copy.deepcopy(teacher), place.device)
    parameters = add_lora(unet, STYLE_RANK)
    loss_of = denoising_loss(course, place, data, encoder, unet)
    train(f"style-{style}", course, place, parameters, loss_of)
    return unet.eval()
