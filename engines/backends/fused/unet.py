"""diffusers' UNet of Stable Diffusion as few, large kernels over the same parameters."""

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
)


class Level(NamedTuple):
    """One block of the way down, the middle or the way up."""

    resnets: list[ResnetBlock]
    transformers: list[Transformer]  # one for each resnet, or none
    downsample: Downsample | None = None
    upsample: Upsample | None = None


class FusedUNet(nn.Module):
    """Agrees with ``UNet2DConditionModel.forward`` (diffusers/models/unets/unet_2d_condition.py).

    The projections of the time into all resnets are one product, and so are those of the prompt
    into all cross-attentions. A module only by its interface: the parameters stay the source's.
    """

    def __init__(self, unet: Any) -> None:
        """Raises `Unfusable` for a layout that is not known here. ``unet`` is on its device, in
        its type, and stays there."""
        super().__init__()
        config = unet.config
        expect(unet, encoder_hid_proj=None, class_embedding=None, time_embed_act=None)
        if config.center_input_sample or config.encoder_hid_dim_type:
            raise Unfusable("UNet2DConditionModel with a centred input or a projected prompt")
        if config.addition_embed_type not in (None, "text_time"):  # SDXL's
            raise Unfusable(f"UNet2DConditionModel with {config.addition_embed_type} added")
        expect_kind(unet.conv_norm_out, "GroupNorm")
        self._source = [unet]  # in a list: its parameters are not registered twice
        self.config, self.dtype = config, unet.dtype
        self._down = [
            _level(block, "DownBlock2D", "CrossAttnDownBlock2D") for block in unet.down_blocks
        ]
        self._middle = None if unet.mid_block is None else _middle(unet.mid_block)
        self._up = [_level(block, "UpBlock2D", "CrossAttnUpBlock2D") for block in unet.up_blocks]
        middle = [self._middle] if self._middle else []
        levels = [*self._down, *middle, *self._up]
        resnets = [resnet for level in levels for resnet in level.resnets]
        projections = [resnet.time_projection for resnet in resnets]
        if any(layer is None for layer in projections):
            raise Unfusable("ResnetBlock2D without a time projection")
        layers = [layer for layer in projections if layer is not None]
        self._time_sizes = [layer.out_features for layer in layers]
        self._time_weight, self._time_bias = ops.fuse_linears(layers)
        self._context_weight = _fuse_contexts([t for level in levels for t in level.transformers])

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
        times = F.linear(F.silu(embedded), self._time_weight, self._time_bias)  # [N, ΣC]
        time = iter(torch.split(times, self._time_sizes, dim=1))
        context = (
            prompt_embeds
            if self._context_weight is None
            else F.linear(prompt_embeds, self._context_weight)
        )
        x = sample.permute(0, 2, 3, 1).contiguous()
        x = ops.add(ops.convolve(x, unet.conv_in), unet.conv_in.bias)  # [N, h, w, C]
        skips = [x]
        for level in self._down:
            for resnet, transformer in _pairs(level):
                x = resnet(x, next(time))
                x = x if transformer is None else transformer(x, context)
                skips.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
                skips.append(x)
        if self._middle is not None:
            x = self._middle.resnets[0](x, next(time))
            for resnet, transformer in zip(
                self._middle.resnets[1:], self._middle.transformers, strict=True
            ):
                x = resnet(transformer(x, context), next(time))
        for level in self._up:
            for resnet, transformer in _pairs(level):
                x = resnet(torch.cat([x, skips.pop()], dim=-1), next(time))
                x = x if transformer is None else transformer(x, context)
            if level.upsample is not None:
                x = level.upsample(x, *skips[-1].shape[1:3])
        x = ops.group_norm(x, unet.conv_norm_out, silu=True)
        x = ops.add(ops.convolve(x, unet.conv_out), unet.conv_out.bias)
        return (x.permute(0, 3, 1, 2),)


def _level(block: Any, plain: str, crossed: str) -> Level:
    transformers: list[Transformer] = []
    if type(block).__name__ == crossed:
        transformers = [Transformer(each) for each in block.attentions]
    else:
        expect_kind(block, plain)
    expect(block, s1=None, s2=None, b1=None, b2=None)  # FreeU
    down, up = getattr(block, "downsamplers", None), getattr(block, "upsamplers", None)
    return Level(
        [ResnetBlock(each) for each in block.resnets],
        transformers,
        Downsample(down[0]) if down else None,
        Upsample(up[0]) if up else None,
    )


def _middle(block: Any) -> Level:
    expect_kind(block, "UNetMidBlock2DCrossAttn")
    resnets = [ResnetBlock(each) for each in block.resnets]
    return Level(resnets, [Transformer(each) for each in block.attentions])


def _pairs(level: Level) -> list[tuple[ResnetBlock, Transformer | None]]:
    return list(itertools.zip_longest(level.resnets, level.transformers))


def _fuse_contexts(transformers: list[Transformer]) -> Tensor | None:
    """One weight ``[ΣK, D]`` for the keys and values of all cross-attentions."""
    layers: list[nn.Linear] = []
    first = 0
    for attention in itertools.chain.from_iterable(t.cross_attentions() for t in transformers):
        own = attention.read_context(first)
        first += sum(layer.out_features for layer in own)
        layers += own
    return ops.fuse_linears(layers)[0] if layers else None
