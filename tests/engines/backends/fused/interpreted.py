"""Triton's kernels against torch, in Triton's interpreter: run by `test_kernels`, in a process that
had TRITON_INTERPRET=1 before it imported anything of Triton.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engines.backends.fused import attention_kernels, kernels, ops

# Half the distance of neighbours; of bfloat16 the whole, which the interpreter cuts, not rounds.
LIMITS = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 6e-3}


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def _norm(norm: nn.GroupNorm | nn.LayerNorm, dtype: torch.dtype) -> None:
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    norm.to(dtype)


SHAPES = [
    ((2, 8, 8, 64), 8),  # groups that one program holds
    ((1, 7, 5, 96), 32),
    ((2, 41, 25, 96), 4),  # those that take three kernels
]
LARGE = ((1, 65, 32, 320), 8, torch.float32)  # of more tiles than are folded at a time


@pytest.mark.parametrize(
    ("shape", "num_groups", "dtype"),
    [*[(*each, dtype) for each in SHAPES for dtype in LIMITS], LARGE],
    ids=str,
)
@torch.no_grad()
def test_group_norm(shape: tuple[int, int, int, int], num_groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    channels = shape[-1]
    x = (2 * torch.randn(shape) + 3).to(dtype)
    norm = nn.GroupNorm(num_groups, channels)
    _norm(norm, dtype)
    bias = torch.randn(channels).to(dtype)
    added = torch.randn(shape[0], 2 * channels).to(dtype)[:, channels:]  # a piece of something
    for silu, own_bias, own_added in [(True, bias, added), (True, bias, None), (False, None, None)]:
        found = kernels.group_norm(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps,
            silu=silu, bias=own_bias, added=own_added,
        )  # fmt: skip
        truth = ops.group_norm(
            x.double(), norm.double(), silu=silu,
            bias=None if own_bias is None else own_bias.double(),
            added=None if own_added is None else own_added.double(),
        )  # fmt: skip
        norm.to(dtype)
        assert _relative(found, truth) < LIMITS[dtype]


@torch.no_grad()
def test_group_norm_of_values_far_from_zero() -> None:
    """A mean that is a thousand deviations off: squares summed without it would lose them."""
    for shape in [(1, 8, 8, 64), (1, 41, 25, 192)]:
        x, norm = torch.randn(shape) + 1000, nn.GroupNorm(8, shape[-1])
        found = kernels.group_norm(
            x, 8, norm.weight, norm.bias, norm.eps, silu=False, bias=None, added=None
        )
        truth = ops.group_norm(x.double(), norm.double(), silu=False)
        assert _relative(found, truth) < 1e-3  # float32 keeps seven digits of 1000 + x


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@torch.no_grad()
def test_the_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    limit = LIMITS[dtype]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, added = random(3, 50, 320), random(3, 50, 320)
    norm = nn.LayerNorm(320)
    _norm(norm, dtype)
    for own in (added, None):
        truths = ops.layer_norm(x, norm, None if own is None else own.clone())
        kept = kernels.layer_norm(
            x, norm.weight, norm.bias, norm.eps, None if own is None else own.clone()
        )
        for found, truth in zip(kept, truths, strict=True):
            assert _relative(found, truth) < limit * 3  # both are rounded
    for own, own_gate in [(added, None), (added, random(3, 1, 320)), (None, None)]:
        scale, shift = random(3, 6, 320)[:, 1:3].split(1, dim=1)
        given = (None if own is None else own.clone(), own_gate)
        truths = ops.modulated_norm(x, 1e-6, scale, shift, *given)
        kept = kernels.layer_norm(x, scale, shift, 1e-6, *given)
        for found, truth in zip(kept, truths, strict=True):
            assert _relative(found, truth) < limit * 3
    frames, offset = random(2, 3, 25, 320), random(3, 1, 320)
    found = kernels.layer_norm(frames, norm.weight, norm.bias + offset, norm.eps)[1]
    assert _relative(found, ops.layer_norm(frames, norm, offset=offset)[1]) < limit * 3
    gates = random(3, 5, 2 * 320)
    assert _relative(kernels.geglu(gates), ops.geglu(gates.double())) < limit
    places, bias = random(2, 6, 8, 4 * 96), random(96)
    assert _relative(kernels.interleave(places, bias), ops.interleave(places, bias)) < limit
    residual = random(3, 50, 320)
    for own_bias, own_residual in [(norm.bias, residual), (norm.bias, None), (None, residual)]:
        truth = x.double() + (0 if own_bias is None else own_bias.double())
        truth = truth + (0 if own_residual is None else own_residual.double())
        assert _relative(kernels.add(x.clone(), own_bias, own_residual), truth) < limit
        found = kernels.add(x.clone(), own_bias, own_residual, relu=True)
        assert _relative(found, truth.relu()) < limit
    gate = random(3, 1, 320)
    truth = x.double() * gate.double() + residual.double()
    assert _relative(kernels.add(x.clone(), None, residual, gate=gate), truth) < limit


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"), [(100, 77, 40), (64, 64, 160), (9, 5, 80)]
)
@torch.no_grad()
def test_attention_over_few_keys(queries: int, keys: int, head_dim: int) -> None:
    """In float16: the interpreter multiplies no matrices of bfloat16."""
    torch.manual_seed(0)
    columns = 3 * head_dim
    query = torch.randn(2, queries, columns).half()
    both = torch.randn(2, keys, 4 * columns).half()[..., columns : 3 * columns]  # of others too
    key, value = both.chunk(2, dim=-1)
    lengths = torch.tensor([[1], [max(1, keys - 3)]])
    masked = -10000.0 * (torch.arange(keys) >= lengths)
    for mask in (None, masked):
        found = attention_kernels.short_attention(query, key, value, 3, mask)
        truth = ops.attention(query.double(), key.double(), value.double(), 3, mask)
        # The keys' weights are halves too.
        assert _relative(found, truth) < 3 * LIMITS[torch.float16]


@pytest.mark.parametrize(("frames", "places", "head_dim"), [(16, 12, 40), (5, 7, 80), (24, 3, 24)])
@torch.no_grad()
def test_attention_over_frames(frames: int, places: int, head_dim: int) -> None:
    torch.manual_seed(0)
    columns = 3 * head_dim
    given = torch.randn(2, frames, places, 3 * columns).half().chunk(3, dim=-1)
    found = attention_kernels.frame_attention(*given, 3)
    truth = ops.frame_attention(*(each.double() for each in given), 3)
    assert _relative(found, truth) < 3 * LIMITS[torch.float16]
