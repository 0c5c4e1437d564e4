"""A gate before the engine: what is drawn behind it takes as long as a test wants."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from engines.drawing.drawing import Drawing
from engines.drawing.runner import Runner


class Gate(threading.Event):
    """Denoise calls wait at it, where it is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.set()
        self.reached = threading.Event()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        self.clear()
        try:
            yield
        finally:
            self.set()


@contextlib.contextmanager
def gated() -> Iterator[Gate]:
    """An open one, before every service that is started within."""
    sound, gate = Runner.denoise, Gate()

    def denoise(runner: Runner, drawings: Sequence[Drawing], **options: Any) -> None:
        if not gate.is_set():
            gate.reached.set()
        gate.wait(60)
        sound(runner, drawings, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "denoise", denoise)
        yield gate
        gate.set()
