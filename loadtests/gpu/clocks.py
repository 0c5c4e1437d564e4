"""Two clocks: what a caller waits, and what the device works."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

MAX_CALLS = 400
QUEUED = 8  # calls between two synchronisations: the host's launches hide behind the device's work


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def wall_ms(call: Callable[[], object], device: str, seconds: float = 0.4, least: int = 5) -> float:
    """Median time until a call's work is done, after two that do not count."""
    call()
    call()
    wait(device)
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < least or (len(found) < MAX_CALLS and time.perf_counter() < until):
        begun = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(found)


def device_ms(
    call: Callable[[], object], device: str, seconds: float = 0.4, least: int = 10
) -> float:
    """Median of the device's own time, by events around calls that are queued without waiting.

    Where the host launches more slowly than the device works, as with eager modules, that is the
    host's time after all. On a CPU there is one clock only.
    """
    if device != "cuda":
        return wall_ms(call, device, seconds, least)
    call()
    torch.cuda.synchronize()
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    until = time.perf_counter() + seconds
    while len(events) < least or (len(events) < MAX_CALLS and time.perf_counter() < until):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
        if len(events) % QUEUED == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return statistics.median([float(begin.elapsed_time(end)) for begin, end in events])
