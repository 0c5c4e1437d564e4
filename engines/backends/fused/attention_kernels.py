"""Triton kernels for attention over few keys, where cuDNN would gain nothing.

In half precision; what they compute stands in `ops`. Like `kernels` they can be captured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.backends.fused.kernels import load, stride_of


@triton.jit(do_not_specialize=["num_queries", "num_keys", "mask_image"])
def _short_attention(
    query, key, value, mask, y, query_image, query_row, key_image, key_row, mask_image,
    num_queries, num_keys, num_columns, scale, has_mask: tl.constexpr,
    head_dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """Some queries of one head against all of its keys, ``keys`` at a time."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, width)
    is_row, is_column = row < num_queries, column < head_dim
    within = is_row[:, None] & is_column[None, :]
    at = head * head_dim + column
    queries = tl.load(
        query + image * query_image + row[:, None] * query_row + at[None, :], mask=within, other=0.0
    )
    largest = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    sums = tl.zeros((rows, width), tl.float32)
    first = 0
    while first < num_keys:
        item = first + tl.arange(0, keys)
        there = image * key_image + item[:, None] * key_row + at[None, :]
        known = (item < num_keys)[:, None] & is_column[None, :]
        own = tl.load(key + there, mask=known, other=0.0)  # [keys, width]
        scores = tl.dot(queries, tl.trans(own)) * scale  # [rows, keys]
        if has_mask:
            scores += load(mask + image * mask_image + item, item < num_keys)[None, :]
        scores = tl.where((item < num_keys)[None, :], scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - above[:, None])
        kept = tl.exp(largest - above)
        total = total * kept + tl.sum(weights, 1)
        own = tl.load(value + there, mask=known, other=0.0)
        sums = sums * kept[:, None] + tl.dot(weights.to(own.dtype), own)
        largest = above
        first += keys
    sums /= total[:, None]
    at = (image * num_queries + row[:, None]) * num_columns + at[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["num_frames"])
def _frame_attention(
    query, key, value, y, clip_stride, frame_stride, place_stride, num_frames, num_places, scale,
    num_heads: tl.constexpr, head_dim: tl.constexpr, width: tl.constexpr, frames: tl.constexpr,
):  # fmt: skip
    """One head of one place: all of its frames to each other."""
    head, place = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    clip = tl.program_id(1).to(tl.int64)
    frame, column = tl.arange(0, frames), tl.arange(0, width)
    is_frame = frame < num_frames
    mask = is_frame[:, None] & (column < head_dim)[None, :]
    at = clip * clip_stride + frame.to(tl.int64)[:, None] * frame_stride + place * place_stride
    at += head * head_dim + column[None, :]
    queries = tl.load(query + at, mask=mask, other=0.0)
    keys = tl.load(key + at, mask=mask, other=0.0)
    values = tl.load(value + at, mask=mask, other=0.0)
    scores = tl.dot(queries, tl.trans(keys)) * scale  # [frames, frames]
    scores = tl.where(is_frame[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    found = tl.dot(weights.to(values.dtype), values) / tl.sum(weights, 1)[:, None]
    at = (clip * num_frames + frame[:, None]) * num_places + place
    at = at * num_heads * head_dim + head * head_dim + column[None, :]
    tl.store(y + at, found.to(y.dtype.element_ty), mask=mask)


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None = None
) -> Tensor:
    """`ops.attention` of ``query [N, L, C]`` over ``key, value [N, K, C]``, which may be columns of
    one wider tensor, in half precision."""
    images, num_queries, columns = query.shape
    head_dim = columns // num_heads
    y = torch.empty((images, num_queries, columns), dtype=query.dtype, device=query.device)
    width = max(16, triton.next_power_of_2(head_dim))
    _short_attention[(triton.cdiv(num_queries, 64), num_heads, images)](
        query, key, value, query if mask is None else mask, y, query.stride(0), query.stride(1),
        key.stride(0), key.stride(1), stride_of(mask), num_queries, key.shape[1], columns,
        head_dim**-0.5, has_mask=mask is not None, head_dim=head_dim, width=width, rows=64,
        keys=32, num_warps=4,
    )  # fmt: skip
    return y


def frame_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """`ops.frame_attention` of ``[N, F, P, C]``, in half precision."""
    clips, num_frames, places, columns = query.shape
    head_dim = columns // num_heads
    y = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    width = max(16, triton.next_power_of_2(head_dim))
    frames = max(16, triton.next_power_of_2(num_frames))
    _frame_attention[(places * num_heads, clips)](
        query, key, value, y, *query.stride()[:3], num_frames, places, head_dim**-0.5,
        num_heads=num_heads, head_dim=head_dim, width=width, frames=frames,
        num_warps=max(1, frames * width // 1024),
    )  # fmt: skip
    return y
