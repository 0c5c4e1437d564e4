"""What a large matrix product reaches here: the peak that engines are held against.

Operands are random: a GPU draws less power on zeros and ones, clocks higher and shows a tenth more
than any model can reach (894 against 788 TFLOP/s on an H200, 8192 square, bf16).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
REPEATS = 8
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def plain_fp32() -> None:
    """One policy for all that is measured: fp32 is fp32, in products and in convolutions.

    By default torch lets cuDNN round to TF32 and cuBLAS not, so that an engine in fp32 would be
    held against the peak of another arithmetic.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def matrix_peak(
    precision: str,
    device: str,
    side: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of the best of eight products of two random square matrices; in int8 of integers,
    whose sums are int32.
    """
    side = side or SIDE[device]
    generator = torch.Generator(device).manual_seed(0)
    normal = [torch.randn(side, side, generator=generator, device=device) for _ in range(2)]
    if precision == "int8":
        a, b = ((each * 32).clamp(-128, 127).to(torch.int8) for each in normal)
        product = torch._int_mm
    else:
        a, b = (each.to(DTYPES[precision]) for each in normal)
        product = torch.mm
    found = []
    for _ in range(REPEATS):
        _wait(device)
        begun = clock()
        product(a, b)
        _wait(device)
        found.append(clock() - begun)
    return 2 * side**3 / min(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
