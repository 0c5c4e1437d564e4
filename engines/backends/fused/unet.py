"""diffusers' UNets of pictures and of clips as few, large kernels over the same parameters."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.fused import ops
from engines.backends.fused.blocks import (
    Downsample,
    ResnetBlock,
    Transformer,
    Unfusable,
    Upsample,
    expect,
    expect_kind,
    fuse_contexts,
)
from engines.backends.fused.motion import MotionModule
from engines.motion_unet import POOLED_TEXT


class Layer(NamedTuple):
    """A resnet and, where there are, what comes after it."""

    resnet: ResnetBlock
    transformer: Transformer | None
    motion: MotionModule | None

    def __call__(self, x: Tensor, time: Tensor, context: Tensor, num_frames: int) -> Tensor:
        x = self.resnet(x, time)
        x = x if self.transformer is None else self.transformer(x, context)
        return x if self.motion is None else self.motion(x, num_frames)


class Level(NamedTuple):
    """One block of the way down, the middle or the way up."""

    layers: list[Layer]
    downsample: Downsample | None = None
    upsample: Upsample | None = None


class FusedUNet(nn.Module):
    """Agrees with ``UNet2DConditionModel.forward`` (diffusers/models/unets/unet_2d_condition.py).

    The projections of the time into all resnets are one product, and so are those of the prompt
    into all cross-attentions. A module only by its interface: the parameters stay the source's.
    """

    additions: tuple[str | None, ...] = (None, "text_time")  # to the time; the latter is SDXL's

    def __init__(self, unet: Any) -> None:
        """Raises `Unfusable` for a layout that is not known here. ``unet`` is on its device, in
        its type, and stays there."""
        super().__init__()
        config, kind = unet.config, type(unet).__name__
        expect(unet, encoder_hid_proj=None, class_embedding=None, time_embed_act=None)
        if config.get("center_input_sample") or config.get("encoder_hid_dim_type"):
            raise Unfusable(f"{kind} with a centred input or a projected prompt")
        if config.addition_embed_type not in self.additions:
            raise Unfusable(f"{kind} with {config.addition_embed_type} added")
        expect_kind(unet.conv_norm_out, "GroupNorm")
        self._source = [unet]  # in a list: its parameters are not registered twice
        self.config, self.dtype = config, unet.dtype
        self._down = [_level(block) for block in unet.down_blocks]
        self._middle = Level([]) if unet.mid_block is None else _level(unet.mid_block)
        self._up = [_level(block) for block in unet.up_blocks]
        layers = [layer for at in (*self._down, self._middle, *self._up) for layer in at.layers]
        projections = [layer.resnet.time_projection for layer in layers]
        known = [each for each in projections if each is not None]
        if len(known) < len(projections):
            raise Unfusable("ResnetBlock2D without a time projection")
        self._time_sizes = [each.out_features for each in known]
        self._time_weight, self._time_bias = ops.fuse_linears(known)
        transformers = [layer.transformer for layer in layers if layer.transformer is not None]
        self._context_weight, self._context_bias = fuse_contexts(
            attention for each in transformers for attention in each.cross_attentions()
        )

    def refresh(self) -> None:
        """Make anew what was made of weights that have changed in place."""
        for level in self._up:
            if level.upsample is not None:
                level.upsample.refresh()

    def forward(
        self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, *,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None, return_dict: bool = False,
    ) -> tuple[Tensor]:  # fmt: skip
        """``sample [N, C, h, w]``, ``timestep [N]``, ``prompt_embeds [N, L, D]`` → noise as
        ``sample``."""
        (unet,) = self._source
        embedded = unet.time_embedding(
            unet.get_time_embed(sample=sample, timestep=timestep), timestep_cond
        )
        added = unet.get_aug_embed(
            emb=embedded, encoder_hidden_states=prompt_embeds, added_cond_kwargs=added_cond_kwargs
        )
        embedded = embedded if added is None else embedded + added
        return (self._draw(sample, embedded, prompt_embeds),)

    def _draw(
        self, sample: Tensor, embedded: Tensor, prompt_embeds: Tensor, num_frames: int = 1
    ) -> Tensor:
        """``sample [N F, C, h, w]``, ``embedded [N, E]`` of the time, ``prompt_embeds [N, L, D]`` →
        noise as ``sample``."""
        (unet,) = self._source
        times = F.linear(F.silu(embedded), self._time_weight, self._time_bias)  # [N, ΣC]
        times = times if num_frames == 1 else times.repeat_interleave(num_frames, dim=0)
        time = iter(torch.split(times, self._time_sizes, dim=1))
        context = (
            prompt_embeds
            if self._context_weight is None
            else F.linear(prompt_embeds, self._context_weight, self._context_bias)
        )
        x = sample.permute(0, 2, 3, 1).contiguous()
        x = ops.add(ops.convolve(x, unet.conv_in), unet.conv_in.bias)  # [N F, h, w, C]
        skips = [x]
        for level in self._down:
            for layer in level.layers:
                x = layer(x, next(time), context, num_frames)
                skips.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
                skips.append(x)
        for layer in self._middle.layers:
            x = layer(x, next(time), context, num_frames)
        for level in self._up:
            for layer in level.layers:
                x = torch.cat([x, skips.pop()], dim=-1)
                x = layer(x, next(time), context, num_frames)
            if level.upsample is not None:
                x = level.upsample(x, *skips[-1].shape[1:3])
        x = ops.group_norm(x, unet.conv_norm_out, silu=True)
        x = ops.add(ops.convolve(x, unet.conv_out), unet.conv_out.bias)
        return x.permute(0, 3, 1, 2)


class FusedMotionUNet(FusedUNet):
    """Agrees with ``UNetMotionModel.forward`` (diffusers/models/unets/unet_motion_model.py), and
    with `PooledTextUNet`'s.

    The frames of a row are drawn as pictures that share their time and their prompt.
    """

    additions = (None, POOLED_TEXT)

    def forward(
        self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, *,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None, return_dict: bool = False,
    ) -> tuple[Tensor]:  # fmt: skip
        """``sample [N, C, F, h, w]``, ``timestep [N]``, ``prompt_embeds [N F, L, D]``, alike for
        the frames of a row → noise as ``sample``."""
        (unet,) = self._source
        rows, frames = sample.shape[0], sample.shape[2]
        prompt = prompt_embeds[::frames]  # [N, L, D]
        pooled = self.config.addition_embed_type == POOLED_TEXT
        embedded = unet.time_embedding(
            unet.time_proj(timestep).to(self.dtype),
            (timestep_cond, prompt) if pooled else timestep_cond,
        )
        pictures = sample.transpose(1, 2).flatten(0, 1)
        drawn = self._draw(pictures, embedded, prompt, frames)
        return (drawn.view(rows, frames, *drawn.shape[1:]).transpose(1, 2),)


PLAIN = ("DownBlock2D", "UpBlock2D", "DownBlockMotion", "UpBlockMotion")
CROSSED = (
    "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D",
    "CrossAttnDownBlockMotion", "UNetMidBlockCrossAttnMotion", "CrossAttnUpBlockMotion",
)  # fmt: skip


def _level(block: Any) -> Level:
    """Of the middle, whose last resnet has nothing after it, as of the others."""
    kind = type(block).__name__
    if kind not in PLAIN + CROSSED:
        raise Unfusable(f"a {kind}")
    expect(block, s1=None, s2=None, b1=None, b2=None)  # FreeU
    transformers = block.attentions if kind in CROSSED else ()
    layers = itertools.starmap(
        Layer,
        itertools.zip_longest(
            map(ResnetBlock, block.resnets),
            map(Transformer, transformers),
            map(MotionModule, getattr(block, "motion_modules", ())),
        ),
    )
    down, up = getattr(block, "downsamplers", None), getattr(block, "upsamplers", None)
    return Level(
        list(layers), Downsample(down[0]) if down else None, Upsample(up[0]) if up else None
    )
