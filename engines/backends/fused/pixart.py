"""diffusers' transformer of PixArt as few, large kernels over the same parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.backends.fused import ops
from engines.backends.fused.blocks import Attention, Unfusable, expect, expect_kind, fuse_contexts

MASKED = -10000.0  # added to what a token scores that is none


class FusedPixArt(nn.Module):
    """Agrees with ``PixArtTransformer2DModel.forward`` (diffusers/models/transformers/
    pixart_transformer_2d.py).

    What the time does to all blocks is one sum, and the keys and values of the prompt for all of
    them are one product. A module only by its interface: the parameters stay the source's.
    """

    def __init__(self, transformer: Any) -> None:
        """Raises `Unfusable` for a layout that is not known here. ``transformer`` is on its device,
        in its type, and stays there."""
        super().__init__()
        self._source = [transformer]  # in a list: its parameters are not registered twice
        self.config, self.dtype = transformer.config, transformer.dtype
        self._norm_out = norm_without_weights(transformer.norm_out)
        self._blocks = [Block(block) for block in transformer.transformer_blocks]
        weight, bias = fuse_contexts(block.cross_attention for block in self._blocks)
        if weight is None:
            raise Unfusable("PixArtTransformer2DModel without blocks")
        self._context_weight, self._context_bias = weight, bias
        tables = [block.scale_shift_table for block in transformer.transformer_blocks]
        self._tables = ops.fuse_parameters(tables)  # [blocks, 6, D]
        ones = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]  # beside the scales: 1 + scale
        self._ones = self._tables.new_tensor(ones, dtype=torch.float32)[:, None]

    def forward(
        self, latents: Tensor, *, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor,
        timestep: Tensor, added_cond_kwargs: dict[str, Any], return_dict: bool = False,
    ) -> tuple[Tensor]:  # fmt: skip
        """``latents [N, C, h, w]``, ``encoder_hidden_states [N, L, E]`` and their mask ``[N, L]``,
        1 where there is a token → ``[N, C', h, w]``."""
        (source,) = self._source
        x = source.pos_embed(latents).contiguous()  # [N, h/p · w/p, D]
        rows, _, width = x.shape
        times, embedded = source.adaln_single(
            timestep, added_cond_kwargs, batch_size=rows, hidden_dtype=x.dtype
        )
        prompt = encoder_hidden_states
        if source.caption_projection is not None:
            prompt = source.caption_projection(prompt)
        context = F.linear(prompt, self._context_weight, self._context_bias)
        mask = (1 - encoder_attention_mask.float()) * MASKED
        modulations = (
            self._tables[:, None].float() + times.view(rows, 6, width).float() + self._ones
        )  # [blocks, N, 6, D]
        added = gate = None
        for block, modulation in zip(self._blocks, modulations, strict=True):
            x, added, gate = block(x, added, gate, modulation, context, mask)
        shift, scale = (source.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        _, x = ops.modulated_norm(x, self._norm_out.eps, 1 + scale, shift, added, gate)
        x = F.linear(x, source.proj_out.weight, source.proj_out.bias)
        patch = self.config.patch_size
        high, wide = (side // patch for side in latents.shape[2:])
        x = x.view(rows, high, wide, patch, patch, source.out_channels)
        x = x.permute(0, 5, 1, 3, 2, 4)  # [N, C', h/p, p, w/p, p]
        return (x.reshape(rows, source.out_channels, *latents.shape[2:]),)


class Block:
    """diffusers/models/attention.py `BasicTransformerBlock` with ``ada_norm_single``."""

    def __init__(self, source: Any) -> None:
        expect_kind(source, "BasicTransformerBlock")
        expect(source, norm_type="ada_norm_single", pos_embed=None, only_cross_attention=False)
        expect(source, fuser=None, _chunk_size=None)
        self._norms = norm_without_weights(source.norm1), norm_without_weights(source.norm2)
        self._self_attention = Attention(source.attn1)
        self._self_attention.fuse_with_queries()
        self.cross_attention = Attention(source.attn2)
        self._hidden = expect_kind(source.ff.net[0], "GELU")
        expect(self._hidden, approximate="tanh")
        if self._hidden.proj.bias is None:
            raise Unfusable("GELU of a product without bias")
        self._out = source.ff.net[2]

    def __call__(
        self, x: Tensor, added: Tensor | None, gate: Tensor | None, modulation: Tensor,
        context: Tensor, mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """``x [N, L, D]``, to which ``added · gate`` is still to be added: left by the block before
        and, in its turn, left to the next. ``modulation [N, 6, D]``."""
        first, second = self._norms
        shift, scale, own_gate, next_shift, next_scale, next_gate = torch.split(
            modulation, 1, dim=1
        )
        x, normed = ops.modulated_norm(x, first.eps, scale, shift, added, gate)
        x = ops.add(self._self_attention(normed), None, x, gate=own_gate)
        seen = self.cross_attention(x, context, mask)  # of what is not normed
        x, normed = ops.modulated_norm(x, second.eps, next_scale, next_shift, seen)
        hidden = ops.gelu(normed, self._hidden.proj)
        return x, F.linear(hidden, self._out.weight, self._out.bias), next_gate


def norm_without_weights(norm: Any) -> Any:
    """The norm itself, whose scale and shift are of the time alone."""
    expect(expect_kind(norm, "LayerNorm"), weight=None, bias=None)
    return norm
