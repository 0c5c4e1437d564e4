"""What a section is given: a device, a time to be done by, and a place for what it finds."""

from __future__ import annotations

import contextlib
import gc
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field

from loadtests.gpu.findings import Findings

OUT_OF_TIME = 3  # exit code of a section that left something out


class DeviceLost(RuntimeError):
    """After this CUDA error nothing of the process works any more; others are not touched."""


@dataclass
class Section:
    """One section's run. It ends by itself before ``ends_at``, after which it would be ended."""

    name: str
    device: str
    findings: Findings
    ends_at: float  # of time.monotonic()
    left_out: list[str] = field(default_factory=list)

    def row(self, table: str, **values: object) -> None:
        self.findings.row(self.name, table, values)

    @property
    def seconds_left(self) -> float:
        return self.ends_at - time.monotonic()

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether ``what``, which takes about so long, may begin; otherwise the page says so."""
        if self.seconds_left >= seconds:
            return True
        self.left_out.append(what)
        self.row("left out", what=what, needs_s=seconds, had_s=self.seconds_left)
        return False

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails in here is a row of the page, and the section goes on.

        Raises:
            DeviceLost: the GPU answers nothing any more.
        """
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.row("failed", what=what, error=f"{type(error).__name__}: {str(error)[:300]}")
            if self.device == "cuda" and _is_lost():
                raise DeviceLost(f"{what}: {error}") from error
        finally:
            gc.collect()
            if self.device == "cuda":
                _free()


def _free() -> None:
    import torch  # here: a section that asks no GPU anything need not wait for it

    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _is_lost() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
