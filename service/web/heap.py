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
        # Held after the last time that it was given back, or less: with nothing in use by uploads,
        # and at any other time, when what is in use counts too.
        self._least_bytes = {True: 0, False: 0}

    def trim(self, *, idle: bool) -> None:
        """Give back what is free if more is held than after the last time that was as ``idle``."""
        held = held_bytes()
        least = self._least_bytes[idle] = min(self._least_bytes[idle], held)
        if self._trim is not None and held > least + KEPT_BYTES:
            self._trim(0)  # ctypes lets other threads have the interpreter meanwhile
            self._least_bytes[idle] = held_bytes()


def held_bytes() -> int:
    """Anonymous memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return 0
    return (resident - shared) * PAGE_BYTES
