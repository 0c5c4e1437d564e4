"""What can go wrong between a checkpoint and an image.

EngineError
 ├─ InvalidInput         a caller's value cannot be served
 ├─ CheckpointError      the source model is missing, unsafe or of an unsupported kind
 ├─ BundleError          a compiled bundle is missing, damaged or stale
 ├─ BackendUnavailable   a package or a device is absent
 ├─ BuildError           compiling failed
 ├─ OutOfMemory          an engine call found no memory; nothing of its rows has changed
 └─ DeviceLost           the GPU answers this process no more; only another process can draw
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of everything `engines` raises on purpose."""


def reason_of(error: Exception) -> str:
    """What another library says went wrong, as part of one line of ours."""
    lines = str(error).split("\n")
    return lines[0].strip()[:300] or type(error).__name__


class InvalidInput(EngineError):
    """``field`` has a ``value`` that cannot be served; the message names limit and way out."""

    def __init__(self, field: str, value: object, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.value = value


class CheckpointError(EngineError):
    """The source model is missing, unsafe or of an unsupported kind."""


class BundleError(EngineError):
    """A compiled bundle is missing, damaged or stale; the message says how to rebuild it."""


class BackendUnavailable(EngineError):
    """A package or device is absent; the message says what to install or choose."""


class BuildError(EngineError):
    """Compiling failed."""


class OutOfMemory(EngineError):
    """An engine call found no memory; its rows are as before, and fewer of them may fit."""


class DeviceLost(EngineError):
    """The GPU answers this process no more: every later call would fail, so it must be replaced."""
