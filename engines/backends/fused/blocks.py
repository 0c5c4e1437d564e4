"""The blocks that UNets and VAEs share, over diffusers' own parameters, channels last.

Each takes the layers of diffusers' module whose name it bears and agrees with its forward. A bias
after a convolution is left to what reads the outcome next. Layouts that a block does not know are
refused when it is made (`Unfusable`), never drawn wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.fused import ops


class Unfusable(Exception):
    """A module with a layout that is not known here; the message says which."""


def expect(module: nn.Module, **wanted: object) -> None:
    """Raise `Unfusable` unless the module has these attributes; an absent one counts as None."""
    for name, value in wanted.items():
        found = getattr(module, name, None)
        if found != value:
            raise Unfusable(f"{type(module).__name__} with {name} {found!r}")


def expect_kind(module: object, kind: str) -> Any:
    """The module itself, where it is of diffusers' class of that name."""
    if type(module).__name__ != kind:
        raise Unfusable(f"a {type(module).__name__} in place of a {kind}")
    return module


class ResnetBlock:
    """diffusers/models/resnet.py; ``time [N, C]`` is what its time projection gave."""

    def __init__(self, source: Any) -> None:
        expect_kind(source, "ResnetBlock2D")
        expect(source, upsample=None, downsample=None)
        if source.time_embedding_norm not in ("default", "group"):  # alike where there is no time
            raise Unfusable(f"ResnetBlock2D with {source.time_embedding_norm} of the time")
        expect(source, output_scale_factor=1.0, skip_time_act=False)
        if not isinstance(source.nonlinearity, nn.SiLU):
            raise Unfusable(f"ResnetBlock2D with {source.nonlinearity}")
        self._norm1, self._conv1 = source.norm1, source.conv1
        self._norm2, self._conv2 = source.norm2, source.conv2
        self._shortcut = source.conv_shortcut
        self.time_projection: nn.Linear | None = source.time_emb_proj

    def __call__(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """``[N, H, W, C]`` → ``[N, H, W, C']``."""
        hidden = ops.convolve(ops.group_norm(x, self._norm1, silu=True), self._conv1)
        hidden = ops.group_norm(hidden, self._norm2, silu=True, bias=self._conv1.bias, added=time)
        hidden = ops.convolve(hidden, self._conv2)
        residual = x if self._shortcut is None else ops.project(x, self._shortcut)
        return ops.add(hidden, self._conv2.bias, residual)


class Transformer:
    """diffusers/models/transformers/transformer_2d.py, of continuous inputs."""

    def __init__(self, source: Any) -> None:
        expect_kind(source, "Transformer2DModel")
        expect(source, is_input_continuous=True)
        self._norm, self._proj_in, self._proj_out = source.norm, source.proj_in, source.proj_out
        self._blocks = [TransformerBlock(block) for block in source.transformer_blocks]

    def cross_attentions(self) -> list[Attention]:
        return [block.cross_attention for block in self._blocks]

    def __call__(self, x: Tensor, context: Tensor) -> Tensor:
        """``x [N, H, W, C]``; ``context [N, L, ΣK]``: keys and values for every attention."""
        hidden = ops.project(ops.group_norm(x, self._norm, silu=False), self._proj_in)
        hidden = hidden.flatten(1, 2)  # [N, H · W, C]
        for block in self._blocks:
            hidden = block(hidden, context)
        hidden = F.linear(hidden, self._proj_out.weight.flatten(1)).view_as(x)
        return ops.add(hidden, self._proj_out.bias, x)


class TransformerBlock:
    """diffusers/models/attention.py `BasicTransformerBlock`: self, cross and feed-forward."""

    def __init__(self, source: Any) -> None:
        expect_kind(source, "BasicTransformerBlock")
        expect(source, norm_type="layer_norm", pos_embed=None, only_cross_attention=False)
        expect(source, double_self_attention=False, _chunk_size=None)
        self._norms = norms_of(source)
        self._self_attention = Attention(source.attn1)
        self._self_attention.fuse_with_queries()
        self.cross_attention = Attention(source.attn2)
        self._feed_forward = FeedForward(source.ff)

    def __call__(self, x: Tensor, context: Tensor) -> Tensor:
        first, second, third = self._norms
        _, normed = ops.layer_norm(x, first)
        x, normed = ops.layer_norm(x, second, added=self._self_attention(normed))
        x, normed = ops.layer_norm(x, third, added=self.cross_attention(normed, context))
        return self._feed_forward(normed, x)


def norms_of(block: Any) -> tuple[nn.LayerNorm, nn.LayerNorm, nn.LayerNorm]:
    """Those of a `BasicTransformerBlock`, all with weights of their own."""
    for norm in (block.norm1, block.norm2, block.norm3):
        if norm is None or norm.weight is None or norm.bias is None:
            raise Unfusable("BasicTransformerBlock with a norm without weights")
    return block.norm1, block.norm2, block.norm3


class FeedForward:
    """diffusers/models/attention.py `FeedForward`, of gated linear units."""

    def __init__(self, source: Any) -> None:
        expect_kind(source.net[0], "GEGLU")
        self._gate, self._out = source.net[0].proj, source.net[2]

    def __call__(self, normed: Tensor, residual: Tensor) -> Tensor:
        """``[..., C]``, the residual included."""
        hidden = ops.geglu(F.linear(normed, self._gate.weight, self._gate.bias))
        return ops.add(F.linear(hidden, self._out.weight), self._out.bias, residual)


class Attention:
    """diffusers/models/attention_processor.py `AttnProcessor2_0`."""

    def __init__(self, source: Any) -> None:
        expect_kind(source, "Attention")
        expect(source, rescale_output_factor=1.0, residual_connection=False, group_norm=None)
        expect(source, norm_q=None, norm_k=None, norm_cross=None, spatial_norm=None)
        expect(source, add_k_proj=None)
        if source.to_k is None or source.to_v is None:
            raise Unfusable("Attention with none of its own keys")
        expect_kind(source.processor, "AttnProcessor2_0")
        self._heads = int(source.heads)
        expect(source, scale=(source.to_q.out_features // self._heads) ** -0.5)
        self._source, self._out = source, source.to_out[0]
        self._weight: Tensor | None = None  # [3 C, C] where queries, keys and values are one
        self._bias: Tensor | None = None  # [3 C]
        self._columns = slice(0)  # of the context, where its keys and values are

    def fuse_with_queries(self) -> None:
        """Self-attention: one product for all three."""
        layers = [self._source.to_q, self._source.to_k, self._source.to_v]
        self._weight, self._bias = ops.fuse_linears(layers)

    def read_context(self, first: int) -> list[nn.Linear]:
        """Cross-attention: the layers of its keys and values, found in the context from ``first``
        on."""
        layers = [self._source.to_k, self._source.to_v]
        self._columns = slice(first, first + sum(layer.out_features for layer in layers))
        return layers

    def __call__(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """``x [N, L, C]`` → ``[N, L, C]``. A ``context [M, K, ΣK]`` serves N / M of x side by side;
        ``mask [M, K]`` is added to what its keys score."""
        if context is None:
            assert self._weight is not None, "fuse_with_queries comes first"
            out = self._attend(*F.linear(x, self._weight, self._bias).chunk(3, dim=-1))
        else:
            query = F.linear(x, self._source.to_q.weight, self._source.to_q.bias)
            key, value = context[..., self._columns].chunk(2, dim=-1)
            query = query.view(len(key), -1, query.shape[-1])
            out = ops.attention(query, key, value, self._heads, mask).view(*x.shape[:2], -1)
        return F.linear(out, self._out.weight, self._out.bias)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.attention(query, key, value, self._heads)


def fuse_contexts(attentions: Iterable[Attention]) -> tuple[Tensor | None, Tensor | None]:
    """One weight ``[ΣK, D]`` and bias ``[ΣK]`` for the keys and values of all cross-attentions."""
    layers: list[nn.Linear] = []
    first = 0
    for attention in attentions:
        own = attention.read_context(first)
        first += sum(layer.out_features for layer in own)
        layers += own
    return ops.fuse_linears(layers) if layers else (None, None)


class WideAttention:
    """The one head as wide as all channels in the middle of a VAE: two products and a softmax,
    since no fused kernel takes that width well."""

    def __init__(self, source: Any) -> None:
        expect_kind(source, "Attention")
        expect(source, rescale_output_factor=1.0, residual_connection=True, heads=1)
        expect_kind(source.processor, "AttnProcessor2_0")
        expect(source, norm_q=None, norm_k=None, spatial_norm=None)
        self._source = source

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, H, W, C]``, the residual included."""
        source = self._source
        normed = ops.group_norm(x, source.group_norm, silu=False).flatten(1, 2)  # [N, L, C]
        query, key, value = (
            F.linear(normed, layer.weight, layer.bias)
            for layer in (source.to_q, source.to_k, source.to_v)
        )
        images, length, channels = query.shape
        nothing = query.new_empty(1, 1, 1).expand(images, length, length)
        scores = torch.baddbmm(
            nothing, query, key.transpose(1, 2), beta=0, alpha=channels**-0.5
        )  # [N, L, L]
        hidden = torch.bmm(scores.softmax(dim=-1), value)
        hidden = F.linear(hidden, source.to_out[0].weight).view_as(x)
        return ops.add(hidden, source.to_out[0].bias, x)


class Downsample:
    """diffusers/models/downsampling.py; the VAE's pads to the right and below alone."""

    def __init__(self, source: Any) -> None:
        expect_kind(source, "Downsample2D")
        expect(source, use_conv=True, norm=None)
        self._conv, self._uneven = source.conv, source.padding == 0

    def __call__(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 1, 0, 1)) if self._uneven else x
        return ops.add(ops.convolve(x, self._conv), self._conv.bias)


class DoubledConvolution:
    """A 3 x 3 convolution of an image of twice the sides, by nearest neighbours."""

    def __init__(self, conv: nn.Conv2d) -> None:
        expect(conv, kernel_size=(3, 3), padding=(1, 1), stride=(1, 1), groups=1)
        self._conv = conv
        self._phases = ops.phases_of(conv.weight.data)
        none = conv.weight.new_zeros(conv.out_channels)
        self._bias = none if conv.bias is None else conv.bias

    def refresh(self) -> None:
        """What is made of the weights, anew and in place."""
        self._phases.copy_(ops.phases_of(self._conv.weight.data))

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, h, w, C]`` → ``[N, 2 h, 2 w, C']``"""
        return ops.convolve_upsampled(x, self._phases, self._bias)


class Upsample:
    """diffusers/models/upsampling.py."""

    def __init__(self, source: Any) -> None:
        expect_kind(source, "Upsample2D")
        expect(source, use_conv=True, use_conv_transpose=False, norm=None, name="conv")
        expect(source, interpolate=True)
        self._conv, self._doubled = source.conv, DoubledConvolution(source.conv)

    def refresh(self) -> None:
        """What is made of the weights, anew and in place."""
        self._doubled.refresh()

    def __call__(self, x: Tensor, rows: int, columns: int) -> Tensor:
        if (rows, columns) == (2 * x.shape[1], 2 * x.shape[2]):
            return self._doubled(x)
        x = ops.upsample(x, rows, columns)
        return ops.add(ops.convolve(x, self._conv), self._conv.bias)
