"""The embedded default: ONNX Runtime, on any CPU. Tensors are shared with torch, not copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # in order of preference


class OnnxRuntimeEngine:
    """Runs one ``.onnx`` file on ``num_threads`` CPU threads (None: ONNX Runtime's choice)."""

    def __init__(self, path: Path, num_threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        # Within a call, workers spin from one operator to the next (a third more images/s on two
        # cores, November 2026); between calls they sleep, or they would take the cores from HTTP.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        # CUDA where the installed onnxruntime is a GPU build and finds a device.
        available = onnxruntime.get_available_providers()
        providers = [name for name in PROVIDERS if name in available]
        self._session: onnxruntime.InferenceSession | None = onnxruntime.InferenceSession(
            str(path), options, providers=providers
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._session is not None, "closed"
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        results = self._session.run(self._outputs, arrays)
        return {
            name: torch.from_numpy(array)
            for name, array in zip(self._outputs, results, strict=True)
        }

    def close(self) -> None:
        self._session = None
