"""Triton kernels for what lies between the convolutions and products of a UNet or a VAE.

Each reads and writes its tensors once, channels last and in 16-byte pieces; sums are float32. What
they compute stands in `ops`, whose functions choose between them and torch. Nothing here allocates
on the host or waits for the device, so all of it can be captured into a CUDA graph.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_PROGRAMS = 264  # two for each multiprocessor of the largest GPUs (132, H100 and H200)
WHOLE_GROUP = 32768  # values of a group that one program can hold in its registers


@triton.jit
def load(at, mask):
    """As float32, 0 where masked."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _before(bias, added, image, channel, is_channel, added_stride, has_bias, has_added):
    """What is added to each channel of an image before it is normed."""
    before = tl.zeros_like(channel).to(tl.float32)
    if has_bias:
        before += load(bias + channel, is_channel)
    if has_added:
        before += load(added + image * added_stride + channel, is_channel)
    return before


@triton.jit
def _whole_group_norm(
    x, y, gamma, beta, bias, added, added_stride, num_rows, num_channels, eps,
    per_group: tl.constexpr, has_bias: tl.constexpr, has_added: tl.constexpr, silu: tl.constexpr,
    rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """One group of one image: mean, variance and outcome from values read once."""
    group, image = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, rows), tl.arange(0, width)
    channel, is_channel = group * per_group + column, column < per_group
    mask = (row < num_rows)[:, None] & is_channel[None, :]
    at = image.to(tl.int64) * num_rows * num_channels + row[:, None] * num_channels + channel[None]
    before = _before(bias, added, image, channel, is_channel, added_stride, has_bias, has_added)
    value = load(x + at, mask) + before[None, :]
    count = num_rows * per_group
    mean = tl.sum(tl.sum(tl.where(mask, value, 0.0), 1), 0) / count
    off = tl.where(mask, value - mean, 0.0)
    variance = tl.sum(tl.sum(off * off, 1), 0) / count
    scale = load(gamma + channel, is_channel) * tl.rsqrt(variance + eps)
    value = off * scale[None, :] + load(beta + channel, is_channel)[None, :]
    if silu:
        value = value * tl.sigmoid(value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _channel_moments(
    x, moments, num_rows, num_channels,
    rows: tl.constexpr, turns: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Of each channel in a tile of rows: its mean, and the squares of what it is off that.

    Summed as they are off the tile's first row, so that a mean far from zero costs no digits.
    """
    tile, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * width + tl.arange(0, width)
    is_channel = channel < num_channels
    x += image.to(tl.int64) * num_rows * num_channels + channel[None, :]
    first = tile * rows * turns
    pivot = load(x + first * num_channels, is_channel[None, :])  # [1, width]
    total = tl.zeros((rows, width), tl.float32)
    squares = tl.zeros((rows, width), tl.float32)
    for turn in tl.static_range(turns):
        row = first + turn * rows + tl.arange(0, rows)
        mask = (row < num_rows)[:, None] & is_channel[None, :]
        off = tl.where(mask, load(x + row[:, None] * num_channels, mask) - pivot, 0.0)
        total += off
        squares += off * off
    count = tl.minimum(num_rows - first, rows * turns)
    off = tl.sum(total, 0) / count
    to = moments + (image.to(tl.int64) * tl.num_programs(0) + tile) * 2 * num_channels + channel
    tl.store(to, tl.sum(pivot, 0) + off, mask=is_channel)
    tl.store(to + num_channels, tl.sum(squares, 0) - count * off * off, mask=is_channel)


@triton.jit(
    do_not_specialize=["added_stride", "num_rows", "num_channels", "num_tiles", "rows", "per_group"]
)
def _fold_moments(
    moments, folded, gamma, beta, bias, added, added_stride,
    num_rows, num_channels, num_tiles, rows, per_group, eps,
    has_bias: tl.constexpr, has_added: tl.constexpr, tiles: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Of each channel of a group: scale and shift that norm it, what is added before included.

    Of the ``moments`` of ``num_tiles``, each of ``rows``. Small beside what it serves, so it is
    compiled for few shapes: its sizes are arguments.
    """
    group, image = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, width)
    channel, is_channel = group * per_group + column, column < per_group
    before = _before(bias, added, image, channel, is_channel, added_stride, has_bias, has_added)
    moments += image.to(tl.int64) * num_tiles * 2 * num_channels
    total = tl.zeros((width,), tl.float32)
    first = 0
    while first < num_tiles:
        tile = first + tl.arange(0, tiles)
        mask = (tile < num_tiles)[:, None] & is_channel[None, :]
        count = tl.minimum(num_rows - tile * rows, rows).to(tl.float32)[:, None]
        mean = load(moments + tile[:, None] * 2 * num_channels + channel[None, :], mask)
        total += tl.sum(tl.where(mask, mean * count, 0.0), 0)
        first += tiles
    size = num_rows * per_group * 1.0
    group_mean = tl.sum(tl.where(is_channel, total + before * num_rows, 0.0), 0) / size
    squares = tl.zeros((width,), tl.float32)
    first = 0
    while first < num_tiles:
        tile = first + tl.arange(0, tiles)
        mask = (tile < num_tiles)[:, None] & is_channel[None, :]
        count = tl.minimum(num_rows - tile * rows, rows).to(tl.float32)[:, None]
        at = moments + tile[:, None] * 2 * num_channels + channel[None, :]
        off = load(at, mask) + before[None, :] - group_mean
        own = load(at + num_channels, mask)
        squares += tl.sum(tl.where(mask, own + count * off * off, 0.0), 0)
        first += tiles
    variance = tl.sum(tl.where(is_channel, squares, 0.0), 0) / size
    scale = load(gamma + channel, is_channel) * tl.rsqrt(variance + eps)
    shift = load(beta + channel, is_channel) + (before - group_mean) * scale
    to = folded + image * 2 * num_channels + channel
    tl.store(to, scale, mask=is_channel)
    tl.store(to + num_channels, shift, mask=is_channel)


@triton.jit
def _scale_and_shift(
    x, folded, y, num_rows, num_channels,
    silu: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """What `_fold_moments` found, applied."""
    tile, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, channel = tile * rows + tl.arange(0, rows), block * width + tl.arange(0, width)
    is_channel = channel < num_channels
    mask = (row < num_rows)[:, None] & is_channel[None, :]
    at = image.to(tl.int64) * num_rows * num_channels + row[:, None] * num_channels + channel[None]
    folded += image * 2 * num_channels + channel
    scale, shift = load(folded, is_channel), load(folded + num_channels, is_channel)
    value = load(x + at, mask) * scale[None, :] + shift[None, :]
    if silu:
        value = value * tl.sigmoid(value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_per_group", "gate_stride"])
def _add(
    x, bias, gate, residual, y, num_rows, num_channels, num_per_group, gate_stride,
    has_bias: tl.constexpr, has_gate: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr,
    rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * rows
    row = first + tl.arange(0, rows)
    channel = tl.program_id(1) * width + tl.arange(0, width)
    is_channel = channel < num_channels
    mask = (row < num_rows)[:, None] & is_channel[None, :]
    at = row.to(tl.int64)[:, None] * num_channels + channel[None, :]
    value = load(x + at, mask)
    if has_bias:
        value += load(bias + channel, is_channel)[None, :]
    if has_gate:
        value *= load(gate + first // num_per_group * gate_stride + channel, is_channel)[None, :]
    if has_residual:
        value += load(residual + at, mask)
    if relu:
        value = tl.where(value < 0.0, 0.0, value)  # what is no number stays none
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_per_group", "num_groups", "scale_stride", "shift_stride", "gate_stride"]
)
def _layer_norm(
    x, added, gate, total, y, scale, shift, num_rows, num_channels, num_per_group, num_groups,
    scale_stride, shift_stride, gate_stride, eps,
    has_added: tl.constexpr, has_gate: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Rows of one group, of which each has its own scale, shift and gate."""
    first = tl.program_id(0) * rows
    row, channel = first + tl.arange(0, rows), tl.arange(0, width)
    group = first // num_per_group % num_groups
    is_channel = channel < num_channels
    mask = (row < num_rows)[:, None] & is_channel[None, :]
    at = row.to(tl.int64)[:, None] * num_channels + channel[None, :]
    value = load(x + at, mask)
    if has_added:
        more = load(added + at, mask)
        if has_gate:
            more *= load(gate + group * gate_stride + channel, is_channel)[None, :]
        kept = (value + more).to(total.dtype.element_ty)
        tl.store(total + at, kept, mask=mask)
        value = kept.to(tl.float32)  # normed as it is kept, like the plain module does
    mean = tl.sum(value, 1) / num_channels
    off = tl.where(mask, value - mean[:, None], 0.0)
    variance = tl.sum(off * off, 1) / num_channels
    own = load(scale + group * scale_stride + channel, is_channel)
    value = off * tl.rsqrt(variance + eps)[:, None] * own[None, :]
    value += load(shift + group * shift_stride + channel, is_channel)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _geglu(x, y, num_rows, num_columns, rows: tl.constexpr, width: tl.constexpr):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * width + tl.arange(0, width)
    mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    row = row.to(tl.int64)
    at = x + row[:, None] * 2 * num_columns + column[None, :]
    value, gate = load(at, mask), load(at + num_columns, mask)
    value *= 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    at = row[:, None] * num_columns + column[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _interleave(
    x, bias, y, num_pixels, num_rows, num_columns, num_channels,
    rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Four pixels of ``y`` for each pixel of the images before they were upsampled."""
    pixel = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * width + tl.arange(0, width)
    is_channel = channel < num_channels
    mask = (pixel < num_pixels)[:, None] & is_channel[None, :]
    constant = load(bias + channel, is_channel)[None, :]
    pixel = pixel.to(tl.int64)
    column, line = pixel % num_columns, pixel // num_columns  # lines of all images
    image = line // num_rows
    for phase in tl.static_range(4):
        below, right = phase // 2, phase % 2
        source = (
            (line + image + below) * (num_columns + 1) + column + right
        )  # one line, one column more
        value = load(x + (source * 4 + phase)[:, None] * num_channels + channel[None, :], mask)
        target = (2 * line + below) * 2 * num_columns + 2 * column + right
        at = y + target[:, None] * num_channels + channel[None, :]
        tl.store(at, (value + constant).to(y.dtype.element_ty), mask=mask)


def _tile(channels: int) -> tuple[int, int]:
    """Rows and channels of a program that only passes values on: 2,048 in all, twice 16 bytes for
    each thread. On an H200 (November 2026) that moves 4.1 to 4.3 TB/s, as much as a plain copy.
    """
    width = 64 if channels % 128 else 128
    return 2048 // width, width


def group_norm(
    x: Tensor, num_groups: int, gamma: Tensor, beta: Tensor, eps: float, *,
    silu: bool, bias: Tensor | None, added: Tensor | None,
) -> Tensor:  # fmt: skip
    """`ops.group_norm` of ``x [N, H, W, C]``: one kernel where a group is small, else three."""
    images, channels = x.shape[0], x.shape[-1]
    num_rows = x.numel() // (images * channels)
    per_group = channels // num_groups
    y = torch.empty_like(x)
    has = {"has_bias": bias is not None, "has_added": added is not None}
    added_stride = 0 if added is None else added.stride(0)
    constants = (x if bias is None else bias, x if added is None else added, added_stride)
    width, rows = triton.next_power_of_2(per_group), triton.next_power_of_2(num_rows)
    if rows * width <= WHOLE_GROUP:
        _whole_group_norm[(num_groups, images)](
            x, y, gamma, beta, *constants, num_rows, channels, eps, per_group=per_group, **has,
            silu=silu, rows=rows, width=width, num_warps=min(16, max(1, rows * width // 2048)),
        )  # fmt: skip
        return y
    num_blocks = triton.cdiv(channels, 64)
    turns = 16
    while turns > 1 and images * num_blocks * triton.cdiv(num_rows, 32 * turns) < NUM_PROGRAMS:
        turns //= 2
    num_tiles = triton.cdiv(num_rows, 32 * turns)
    moments = torch.empty((images, num_tiles, 2, channels), dtype=torch.float32, device=x.device)
    folded = torch.empty((images, 2, channels), dtype=torch.float32, device=x.device)
    _channel_moments[(num_tiles, num_blocks, images)](
        x, moments, num_rows, channels, rows=32, turns=turns, width=64, num_warps=4
    )
    width = 16 if per_group <= 16 else triton.next_power_of_2(per_group)
    _fold_moments[(num_groups, images)](
        moments, folded, gamma, beta, *constants, num_rows, channels, num_tiles, 32 * turns,
        per_group, eps, **has, tiles=4096 // width, width=width, num_warps=4,
    )  # fmt: skip
    rows, width = _tile(channels)
    _scale_and_shift[(triton.cdiv(num_rows, rows), triton.cdiv(channels, width), images)](
        x, folded, y, num_rows, channels, silu=silu, rows=rows, width=width, num_warps=4
    )
    return y


def stride_of(each: Tensor | None) -> int:
    """From one group to the next of ``each [G, 1, C]``; 0 where it is ``[C]``, or None."""
    return 0 if each is None or each.ndim == 1 else each.stride(0)


def add(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, *, relu: bool = False,
    gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`ops.add` over ``x [..., C]``, into ``x`` itself."""
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    rows, width = _tile(channels)
    per_group = num_rows if gate is None else x.shape[-2]
    rows = rows if gate is None else math.gcd(rows, per_group)
    _add[(triton.cdiv(num_rows, rows), triton.cdiv(channels, width))](
        x, x if bias is None else bias, x if gate is None else gate,
        x if residual is None else residual, x, num_rows, channels, per_group,
        stride_of(gate), has_bias=bias is not None, has_gate=gate is not None,
        has_residual=residual is not None, relu=relu, rows=rows, width=width, num_warps=4,
    )  # fmt: skip
    return x


def layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, added: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ops.modulated_norm` over ``x [..., C]``; the sum goes into ``added`` itself."""
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    y = torch.empty_like(x)
    width = triton.next_power_of_2(channels)
    rows = max(4, 4096 // width)
    total = x if added is None else added
    grouped = [each for each in (scale, shift, gate) if each is not None and each.ndim > 1]
    groups, per_group = (len(grouped[0]), x.shape[-2]) if grouped else (1, num_rows)
    rows = math.gcd(rows, per_group) if grouped else rows  # a program's are of one group
    _layer_norm[(triton.cdiv(num_rows, rows),)](
        x, total, x if gate is None else gate, total, y, scale, shift, num_rows, channels,
        per_group, groups, stride_of(scale), stride_of(shift), stride_of(gate), eps,
        has_added=added is not None, has_gate=gate is not None, rows=rows, width=width,
        num_warps=4,
    )  # fmt: skip
    return total, y


def geglu(x: Tensor) -> Tensor:
    """`ops.geglu` of ``x [..., 2 W]``."""
    columns = x.shape[-1] // 2
    num_rows = x.numel() // (2 * columns)
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    _geglu[(triton.cdiv(num_rows, 8), triton.cdiv(columns, 256))](
        x, y, num_rows, columns, rows=8, width=256, num_warps=4
    )
    return y


def interleave(x: Tensor, bias: Tensor) -> Tensor:
    """`ops.interleave` of ``x [N, h + 1, w + 1, 4 C]``."""
    images, rows, columns, channels = x.shape[0], x.shape[1] - 1, x.shape[2] - 1, x.shape[3] // 4
    y = torch.empty((images, 2 * rows, 2 * columns, channels), dtype=x.dtype, device=x.device)
    pixels = images * rows * columns
    height, width = _tile(channels)
    _interleave[(triton.cdiv(pixels, height), triton.cdiv(channels, width))](
        x, bias, y, pixels, rows, columns, channels, rows=height, width=width, num_warps=4
    )
    return y
