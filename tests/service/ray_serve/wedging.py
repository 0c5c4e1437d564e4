"""A safety filter that lets everything pass, and an engine call without end where a file says so.

Ray's replicas make one as they would anybody's filter, and with it the engine is one that can hang.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from engines.backends.onnxruntime_engine import OnnxRuntimeEngine
from service.access.safety import ALLOWED, Verdict

VARIABLE = "WEDGE_FILE"  # whose file, once it is there, the first call takes away and hangs
_run = OnnxRuntimeEngine.run


def _run_or_hang(self: OnnxRuntimeEngine, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    file = Path(os.environ[VARIABLE])
    if file.exists():
        file.unlink()
        threading.Event().wait()
    return _run(self, inputs)


class Filter:
    def __init__(self) -> None:
        OnnxRuntimeEngine.run = _run_or_hang  # type: ignore[method-assign]

    def check_prompt(self, text: str) -> Verdict:
        return ALLOWED

    def check_images(self, pixels: np.ndarray) -> list[Verdict]:
        return [ALLOWED] * len(pixels)
