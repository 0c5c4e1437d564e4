"""What it means that an engine call fails: no memory, a device that is gone, or neither.

Around the whole call, not the engine's own run alone: tensors are moved, stacked and copied home
where there may be no memory either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch

from engines.errors import DeviceLost, OutOfMemory

# How libraries say that there is no memory in a plain RuntimeError, in lower case.
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",  # torch's allocator on a CPU
    "bytes of memory",  # OpenVINO: "Failed to allocate 8 bytes of memory"
    "failed to allocate memory",
    "bad_alloc",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",
)
Call = TypeVar("Call", bound=Callable[..., None])


class Owner(Protocol):
    """Who makes the calls; ``device`` is ``cpu`` or ``cuda``."""

    @property
    def device(self) -> str: ...


def engine_call(part: str) -> Callable[[Call], Call]:
    """Wrap a method that makes one engine call for its rows; see `faults_of`."""

    def wrap(call: Call) -> Call:
        @functools.wraps(call)
        def guarded(owner: Owner, rows: Sequence[Any], *args: Any, **kwargs: Any) -> None:
            with faults_of(part, len(rows), owner.device):
                call(owner, rows, *args, **kwargs)

        return cast("Call", guarded)

    return wrap


@contextmanager
def faults_of(part: str, num_rows: int, device: str) -> Iterator[None]:
    """Whatever is raised inside goes on, but for two that are made out here.

    Raises:
        OutOfMemory: there was no memory for the call.
        DeviceLost: after any error on a GPU that does not answer any more. Such an error stays with
            the process ("an illegal memory access", "device-side assert triggered").
    """
    try:
        yield
    except Exception as error:
        what = f"{part} of {num_rows} rows"
        if device == "cuda":
            _check_device(what, error)
        if not says_no_memory(error):
            raise
        if device == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(f"no memory for {what}: {error}") from error


def says_no_memory(error: Exception) -> bool:
    """Whether an error of torch, cuBLAS, cuDNN or Python means that there is no memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in NO_MEMORY)


def _check_device(what: str, error: Exception) -> None:
    try:
        torch.cuda.synchronize()
    except Exception as lost:
        raise DeviceLost(f"the GPU is lost since {what} ({error}): {lost}") from lost
