"""Memory that is free goes back to the system.

What glibc has freed it keeps for itself, once blocks of that size have come and gone (its threshold
for `mmap` grows with them), in an arena for each of many threads: after large uploads a replica of
420 MB held 700 with nothing to do (2026-11-27).
"""

from __future__ import annotations

import ctypes
import os

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
KEPT_BYTES = 32 * 2**20  # what may be free without being given back


class Heap:
    """Of this process. `trim` blocks for milliseconds: beside the event loop."""

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        self._least_bytes = 0  # since it was last given back

    def trim(self) -> bool:
        """Give back what is free if more is held than after the last time; whether it was."""
        held = held_bytes()
        self._least_bytes = min(self._least_bytes, held)
        if self._trim is None or held <= self._least_bytes + KEPT_BYTES:
            return False
        self._trim(0)  # ctypes lets other threads have the interpreter meanwhile
        self._least_bytes = held_bytes()
        return True


def held_bytes() -> int:
    """Anonymous memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return 0
    return (resident - shared) * PAGE_BYTES
