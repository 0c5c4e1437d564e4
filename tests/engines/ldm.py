"""Diffusers models in the original (LDM) layout of single files: the way back of its conversion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from torch import Tensor

State = dict[str, Tensor]
UNET, VAE, CLIP, OPEN_CLIP = (
    "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model.",
    "cond_stage_model.model.",
)  # fmt: skip
XL_CLIP, XL_OPEN_CLIP = (
    "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model.",
)  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"
}  # fmt: skip
RESBLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


def unet_state(unet: Any, prefix: str = UNET) -> State:
    layers, per_block = unet.config.layers_per_block, unet.config.layers_per_block + 1
    mapping = DIFFUSERS_TO_LDM_MAPPING["unet"]
    heads = mapping["layers"] | (
        mapping["addition_embed_type"] if unet.config.addition_embed_type else {}
    )

    def ldm(key: str) -> str:
        if key in heads:
            return heads[key]
        match = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.*)", key)
        assert match, key
        side, block, kind, index, rest = match.groups()
        i, j = int(block or 0), int(index)
        rest = _renamed(rest, RESNET) if kind == "resnets" else rest
        slot = "0" if kind == "resnets" else "1"
        if side == "mid":
            return f"middle_block.{2 * j if kind == 'resnets' else 1}.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{1 + i * per_block + layers}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            slot = "2" if getattr(unet.up_blocks[i], "has_cross_attention", False) else "1"
            return f"output_blocks.{i * per_block + layers}.{slot}.{rest}"
        number = i * per_block + j
        blocks = f"input_blocks.{1 + number}" if side == "down" else f"output_blocks.{number}"
        return f"{blocks}.{slot}.{rest}"

    return {prefix + ldm(key): value for key, value in unet.state_dict().items()}


def vae_state(vae: Any, prefix: str = VAE) -> State:
    heads, last = DIFFUSERS_TO_LDM_MAPPING["vae"], len(vae.config.block_out_channels) - 1
    state = {}
    for key, value in vae.state_dict().items():
        name = heads.get(key, key).replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{last - int(match[1])}.", name)
        name = name.replace(".resnets.", ".block.").replace("upsamplers.0", "upsample")
        name = re.sub(
            r"mid_block\.block\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name
        )
        if "mid_block.attentions.0." in name:
            head, _, rest = name.partition("mid_block.attentions.0.")
            name = f"{head}mid.attn_1.{_renamed(rest, ATTENTION)}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        state[prefix + name] = value
    return state


def clip_state(text: Any, prefix: str = CLIP) -> State:
    return {
        prefix + key.removeprefix("text_model."): value for key, value in text.state_dict().items()
    }


def open_clip_state(text: Any, prefix: str = OPEN_CLIP) -> State:
    """Queries, keys and values are one matrix there, and the projection lies the other way."""
    own = {key.removeprefix("text_model."): value for key, value in text.state_dict().items()}
    state = {}
    for key, value in own.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", key):
            parts = [own[key.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            name = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"
            state[prefix + name] = torch.cat(parts)
        elif key.startswith("encoder.layers.") and not re.search(r"\.[kv]_proj\.", key):
            layer = _renamed(key.removeprefix("encoder.layers."), RESBLOCK)
            state[f"{prefix}transformer.resblocks.{layer}"] = value
    for theirs, name in DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"].items():
        value = own.get(theirs.removeprefix("text_model."))
        if value is not None:
            state[prefix + name] = value.T if name == "text_projection" else value
    return state


def checkpoint_state(pipeline: Any) -> State:
    """All weights of a pipeline of Stable Diffusion 1 or 2, or XL, as its file has them."""
    second = getattr(pipeline, "text_encoder_2", None)
    opened = pipeline.text_encoder.config.hidden_act == "gelu"
    texts = (
        clip_state(pipeline.text_encoder, XL_CLIP) | open_clip_state(second, XL_OPEN_CLIP)
        if second else open_clip_state(pipeline.text_encoder)
        if opened else clip_state(pipeline.text_encoder)
    )  # fmt: skip
    state = unet_state(pipeline.unet) | vae_state(pipeline.vae) | texts
    return {key: value.contiguous() for key, value in state.items()}
