"""Motion modules, over diffusers' own parameters: each place of a picture looks at itself in the
other frames. Nothing is moved for it: the frames' pictures lie as they are drawn.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from engines.backends.fused import ops
from engines.backends.fused.blocks import Attention, FeedForward, expect, expect_kind, norms_of


class MotionModule:
    """diffusers/models/unets/unet_motion_model.py `AnimateDiffTransformer3D`."""

    def __init__(self, source: Any) -> None:
        expect_kind(source, "AnimateDiffTransformer3D")
        self._norm, self._proj_in, self._proj_out = source.norm, source.proj_in, source.proj_out
        self._blocks = [FrameBlock(block) for block in source.transformer_blocks]

    def __call__(self, x: Tensor, num_frames: int) -> Tensor:
        """``[B F, H, W, C]``, the frames of a row side by side, and as much again."""
        whole = x.view(-1, num_frames * x.shape[1], *x.shape[2:])  # a clip is normed as one
        hidden = ops.project(ops.group_norm(whole, self._norm, silu=False), self._proj_in)
        hidden = hidden.view(len(whole), num_frames, -1, hidden.shape[-1])  # [B, F, H W, C]
        for block in self._blocks:
            hidden = block(hidden)
        hidden = F.linear(hidden, self._proj_out.weight).view_as(x)
        return ops.add(hidden, self._proj_out.bias, x)


class FrameBlock:
    """diffusers/models/attention.py `BasicTransformerBlock` of a motion module."""

    def __init__(self, source: Any) -> None:
        expect_kind(source, "BasicTransformerBlock")
        expect(source, norm_type="layer_norm", only_cross_attention=False, _chunk_size=None)
        expect(source, double_self_attention=True)
        expect_kind(source.pos_embed, "SinusoidalPositionalEmbedding")
        self._positions = source.pos_embed.pe[0][:, None]  # [frames at most, 1, C]
        self._norms = norms_of(source)
        self._attentions = (FrameAttention(source.attn1), FrameAttention(source.attn2))
        self._feed_forward = FeedForward(source.ff)

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, F, P, C]``"""
        first, second, third = self._norms
        positions = self._positions[: x.shape[1]]
        _, normed = ops.layer_norm(x, first, offset=positions)
        x, normed = ops.layer_norm(
            x, second, added=self._attentions[0](normed), offset=positions
        )  # fmt: skip
        x, normed = ops.layer_norm(x, third, added=self._attentions[1](normed))
        return self._feed_forward(normed, x)


class FrameAttention(Attention):
    """Of each place to itself in all frames: ``[B, F, P, C]`` → ``[B, F, P, C]``."""

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.fuse_with_queries()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.frame_attention(query, key, value, self._heads)
