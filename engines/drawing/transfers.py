"""Between the host and the device: in one piece, from pinned memory, waiting only where one must.

On a CPU nothing moves: tensors are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of each tensor in a block


def upload(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """Host tensors to the device by one copy, on the current stream."""
    if device == "cpu":
        return dict(tensors)
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    steps = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    block = torch.empty(sum(steps), dtype=torch.uint8, pin_memory=True)
    for piece, size, tensor in zip(torch.split(block, steps), sizes, tensors.values(), strict=True):
        piece[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    moved = torch.split(block.to(device, non_blocking=True), steps)
    return {
        name: piece[:size].view(tensor.dtype).view(tensor.shape)
        for (name, tensor), piece, size in zip(tensors.items(), moved, sizes, strict=True)
    }


def stack(rows: Sequence[Tensor], device: str) -> Tensor:
    """Rows of one shape, each on the host or on the device, to one tensor on the device."""
    hosted = [row for row in rows if row.device.type == "cpu"]
    if device == "cpu" or not hosted:
        return torch.stack(list(rows))
    shape = (len(hosted), *hosted[0].shape)
    block = torch.empty(shape, dtype=hosted[0].dtype, pin_memory=True)
    moved = torch.stack(hosted, out=block).to(device, non_blocking=True)
    if len(hosted) == len(rows):
        return moved
    arrived = iter(moved.unbind(0))
    return torch.stack([next(arrived) if row.device.type == "cpu" else row for row in rows])


def fetch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on the host, when all that made them is done."""
    if not any(tensor.is_cuda for tensor in tensors):
        return tensors
    fetched = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for to, tensor in zip(fetched, tensors, strict=True):
        to.copy_(tensor, non_blocking=True)
    wait_for(mark())
    return tuple(fetched)


def mark() -> torch.cuda.Event:
    """A point behind all that the current stream was given so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def wait_for(event: torch.cuda.Event) -> None:
    """Until the device is past the point; other threads run meanwhile."""
    event.synchronize()
