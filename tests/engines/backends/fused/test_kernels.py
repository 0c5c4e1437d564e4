"""Triton's kernels: they compute what torch does, and compile for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel here")
ROOT = Path(__file__).parents[4]


def _run(*arguments: str, **environment: str) -> str:
    """What a process of its own printed: Triton reads its variables where it is imported."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_interpreted_they_compute_what_torch_computes() -> None:
    file = Path(__file__).with_name("interpreted.py")
    said = _run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), TRITON_INTERPRET="1"
    )  # fmt: skip
    assert " passed" in said
    assert "skipped" not in said


@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_gpus_that_are_not_here(capability: int) -> None:
    _run("-c", COMPILE, str(capability), TRITON_INTERPRET="0")


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from engines.backends.fused import attention_kernels, kernels

def check(kernel, constants, num_warps):
    names = kernel.arg_names
    sizes = ("query_image", "query_row", "key_image", "key_row", "mask_image", "rows", "per_group")
    integers = [n for n in names if n.startswith("num_") or n.endswith("_stride") or n in sizes]
    reals = ("eps", "scale") if "scale_stride" not in names else ("eps",)
    types = {n: "i32" if n in integers else "fp32" if n in reals else "*fp16" for n in names}
    types |= {n: "*fp32" for n in ("moments", "folded") if n in names}
    types |= {n: "constexpr" for n in constants}
    places = {(names.index(n),): v for n, v in constants.items()}
    source = ASTSource(kernel, types, constexprs=places)
    target, options = GPUTarget("cuda", int(sys.argv[1]), 32), {"num_warps": num_warps}
    made = compile(source, target=target, options=options)
    assert made.asm["cubin"], kernel

has = {"has_bias": True, "has_added": True}
added = {"has_bias": True, "has_residual": True}
whole = {"silu": True, "rows": 256, "width": 64}
check(kernels._whole_group_norm, {"per_group": 40, **has, **whole}, 8)
check(kernels._channel_moments, {"rows": 32, "turns": 8, "width": 64}, 4)
check(kernels._fold_moments, {**has, "tiles": 256, "width": 16}, 4)
check(kernels._scale_and_shift, {"silu": True, "rows": 64, "width": 64}, 4)
check(kernels._add, {**added, "has_gate": True, "relu": True, "rows": 64, "width": 64}, 4)
modulated = {"has_added": True, "has_gate": True}
check(kernels._layer_norm, {**modulated, "rows": 8, "width": 512}, 4)
check(kernels._geglu, {"rows": 16, "width": 256}, 4)
for head_dim, width in ((40, 64), (80, 128), (160, 256)):
    sizes = {"head_dim": head_dim, "width": width}
    masked = {"has_mask": True, "rows": 64, "keys": 32}
    check(attention_kernels._short_attention, {**sizes, **masked}, 4)
    check(attention_kernels._frame_attention, {**sizes, "num_heads": 8, "frames": 16}, 1)
check(kernels._interleave, {"rows": 16, "width": 64}, 4)
"""
