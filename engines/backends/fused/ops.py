"""What the fused networks are made of, channels last: Triton's kernels on a GPU, else torch.

Agreement of the two is tested under Triton's interpreter, agreement with diffusers' modules in
float32. Inputs are contiguous; arithmetic between reading and writing is float32.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_KEYS = 128  # a text's, or an image's of 8 x 8 latents
# Rows of attention in one call of torch's, whose kernels fail above 65,535
# (pytorch/pytorch#146704 and #181085): half of it, so that two parts of a size share a plan.
MAX_ROWS = 2**15


@functools.cache
def _kernels(name: str = "kernels") -> ModuleType | None:
    """None where Triton is not installed: torch's own kernels then do it, only slower."""
    try:
        return importlib.import_module(f"engines.backends.fused.{name}")
    except ImportError:
        return None


def keep_kernels(folder: Path) -> None:
    """Kernels that Triton compiles are kept there for the next process: five seconds of its start.

    Where Triton was told of a folder (TRITON_CACHE_DIR), it stays with that.
    """
    with contextlib.suppress(ImportError):
        from triton import knobs

        if knobs.cache.dir == knobs.cache.get_triton_dir("cache"):
            knobs.cache.dir = str(folder)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and _kernels() is not None


def group_norm(
    x: Tensor, norm: nn.GroupNorm, *, silu: bool, bias: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Norm of ``x [N, H, W, C] + bias [C] + added [N, C]``, then SiLU where asked."""
    if _has_kernels(x) and (kernels := _kernels()):
        return kernels.group_norm(  # type: ignore[no-any-return]
            x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, bias=bias, added=added
        )
    if bias is not None:
        x = x + bias
    if added is not None:
        x = x + added[:, None, None, :]
    y = F.group_norm(x.permute(0, 3, 1, 2), norm.num_groups, norm.weight, norm.bias, norm.eps)
    y = y.permute(0, 2, 3, 1).contiguous()
    return F.silu(y) if silu else y


def add(
    x: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, relu: bool = False,
    gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``(x [..., C] + bias [C]) · gate + residual [..., C]``, then ReLU where asked; ``x`` is used
    up. ``gate [N, 1, C]`` is for ``x [N, L, C]``."""
    if bias is None and residual is None and gate is None and not relu:
        return x
    if _has_kernels(x) and (kernels := _kernels()):
        return kernels.add(x, bias, residual, relu=relu, gate=gate)  # type: ignore[no-any-return]
    dtype = x.dtype  # a gate may be of another
    x = x if bias is None else x + bias
    x = x if gate is None else x * gate
    x = (x if residual is None else x + residual).to(dtype)
    return F.relu(x) if relu else x


def layer_norm(
    x: Tensor, norm: nn.LayerNorm, added: Tensor | None = None, *, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``x + added`` and its norm, both ``[..., C]``; ``added`` is used up.

    ``offset [G, 1, C]``, for ``x [..., G, L, C]``, is added to the norm.
    """
    shift = norm.bias if offset is None else norm.bias + offset
    return modulated_norm(x, norm.eps, norm.weight, shift, added)


def modulated_norm(
    x: Tensor, eps: float, scale: Tensor, shift: Tensor, added: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``total = x + added · gate`` and its norm, ``· scale + shift``, both ``[..., C]``; ``added``
    is used up.

    ``scale``, ``shift`` and ``gate`` are ``[C]``, or ``[G, 1, C]`` for ``x [..., G, L, C]``.
    """
    if _has_kernels(x) and (kernels := _kernels()):
        return kernels.layer_norm(x, scale, shift, eps, added, gate)  # type: ignore[no-any-return]
    total = x if added is None else x + (added if gate is None else added * gate)
    total = total.to(x.dtype)
    normed = F.layer_norm(total, total.shape[-1:], eps=eps) * scale + shift
    return total, normed.to(x.dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None = None
) -> Tensor:
    """``query [N, L, C]`` over ``key, value [N, K, C]`` → ``[N, L, C]``, all of C in ``num_heads``;
    ``mask [N, K]`` is added to what its keys score.

    Few keys have a kernel of their own: for each shape that it meets cuDNN makes a plan first,
    70 ms beside an H200 (November 2026), and a model has eight shapes for each batch size.
    """
    halves = query.dtype in (torch.float16, torch.bfloat16)
    fits = key.shape[1] <= FEW_KEYS and query.shape[-1] <= 256 * num_heads and halves
    if fits and _has_kernels(query) and (kernels := _kernels("attention_kernels")):
        return kernels.short_attention(query, key, value, num_heads, mask)  # type: ignore[no-any-return]
    query, key, value = (
        x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (query, key, value)
    )
    scores = None if mask is None else mask[:, None, None].to(query.dtype)
    found = F.scaled_dot_product_attention(query, key, value, scores)
    return found.transpose(1, 2).flatten(2)


def frame_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Of each place over its frames: all ``[N, F, P, C]``, thirds of one tensor ``[N, F, P, 3 C]``
    → ``[N, F, P, C]``."""
    halves = query.dtype in (torch.float16, torch.bfloat16)
    if halves and _has_kernels(query) and (kernels := _kernels("attention_kernels")):
        return kernels.frame_attention(query, key, value, num_heads)  # type: ignore[no-any-return]
    parts = (torch.split(x.transpose(1, 2).flatten(0, 1), MAX_ROWS) for x in (query, key, value))
    found = torch.cat([attention(q, k, v, num_heads) for q, k, v in zip(*parts, strict=True)])
    clips, frames, places, channels = query.shape
    return found.view(clips, places, frames, channels).transpose(1, 2).contiguous()


def geglu(x: Tensor) -> Tensor:
    """``value · gelu(gate)`` of ``[..., value and gate]``, the exact GELU."""
    if _has_kernels(x) and (kernels := _kernels()):
        return kernels.geglu(x)  # type: ignore[no-any-return]
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer, bias included, then GELU by tanh."""
    if x.is_cuda:  # where one call does both
        found = torch._addmm_activation(
            layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True
        )
        return found.view(*x.shape[:-1], -1)
    return F.gelu(F.linear(x, layer.weight, layer.bias), approximate="tanh")


def upsample(x: Tensor, rows: int, columns: int) -> Tensor:
    """Nearest neighbours, ``[N, h, w, C]`` → ``[N, rows, columns, C]``."""
    y = F.interpolate(x.permute(0, 3, 1, 2), size=(rows, columns), mode="nearest")
    return y.permute(0, 2, 3, 1).contiguous()


def phases_of(weight: Tensor) -> Tensor:
    """A 3 x 3 convolution after `upsample` to twice the sides, as one of 2 x 2 before it.

    Of the nine pixels it sees only four differ, in one way for each of the four places that a
    target has in its doubled pixel: ``[O, C, 3, 3]`` → ``[4 O, C, 2, 2]``, the places first, with
    4/9 of the multiplications. `interleave` puts what they give in place.
    """
    seen = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
    phases = torch.einsum("auy,bvx,ocyx->abocuv", seen, seen, weight.float()).flatten(0, 2)
    return phases.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def convolve_upsampled(x: Tensor, phases: Tensor, bias: Tensor) -> Tensor:
    """``[N, h, w, C]`` → ``[N, 2 h, 2 w, O]``, bias included."""
    y = F.conv2d(x.permute(0, 3, 1, 2), phases, None, padding=1).permute(0, 2, 3, 1).contiguous()
    return interleave(y, bias)


def interleave(x: Tensor, bias: Tensor) -> Tensor:
    """``x [N, h + 1, w + 1, 4 O] + bias [O]`` → ``[N, 2 h, 2 w, O]``, see `phases_of`."""
    if _has_kernels(x) and (kernels := _kernels()):
        return kernels.interleave(x, bias)  # type: ignore[no-any-return]
    rows, columns = x.shape[1] - 1, x.shape[2] - 1
    y = x.new_empty((x.shape[0], 2 * rows, 2 * columns, len(bias)))
    for phase, part in enumerate(x.chunk(4, dim=-1)):
        below, right = divmod(phase, 2)
        y[:, below::2, right::2] = part[:, below:, right:][:, :rows, :columns] + bias
    return y


def convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """``[N, H, W, C]`` → ``[N, H', W', C']`` without the bias: what comes next adds it."""
    if layer.kernel_size == (1, 1):
        return F.linear(x, layer.weight.flatten(1))
    y = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, None, layer.stride, layer.padding)
    return y.permute(0, 2, 3, 1).contiguous()


def project(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A linear layer or a 1 x 1 convolution over the last axis, bias included."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def fuse_linears(layers: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight ``[ΣO, I]`` and bias ``[ΣO]`` of all layers as one, whose own become views of them.

    What is copied into a layer's parameters afterwards is in the fused ones too. They must not be
    moved to another device or type any more.
    """
    weight = torch.cat([layer.weight.data for layer in layers])
    sizes = [layer.out_features for layer in layers]
    for layer, view in zip(layers, torch.split(weight, sizes), strict=True):
        layer.weight.data = view
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if not biases:
        return weight, None
    assert len(biases) == len(layers), "all layers have a bias or none has"
    bias = torch.cat([each.data for each in biases])
    for own, view in zip(biases, torch.split(bias, sizes), strict=True):
        own.data = view
    return weight, bias


def fuse_parameters(parameters: list[nn.Parameter]) -> Tensor:
    """Parameters of one shape as one, ``[N, ...]``, of which they become views: `fuse_linears`."""
    fused = torch.stack([each.data for each in parameters])
    for own, view in zip(parameters, fused, strict=True):
        own.data = view
    return fused
