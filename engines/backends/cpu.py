"""What this CPU has."""

from __future__ import annotations

import functools

import torch


def _has(*names: str) -> bool:
    found = torch.cpu.get_capabilities()
    return found["architecture"] != "x86_64" or any(found.get(name) for name in names)


@functools.cache
def sums_8_bits() -> bool:
    """Whether a product of uint8 and int8 is right here; an older x86 cuts its sums at 16 bits."""
    return _has("avx512_vnni", "avx_vnni", "amx_int8")


@functools.cache
def multiplies_bf16() -> bool:
    """Whether a product of bf16 is an instruction; an older x86 makes it of several."""
    return _has("avx512_bf16", "amx_bf16")
