"""The embedded default: ONNX Runtime, on any CPU. Tensors are shared with torch, not copied."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from torch import Tensor

from engines.engine import Variant
from engines.onnx_weights import OnnxWeights

# Sessions of recent LoRA sets, for opening one anew costs half a second even on a small model. Each
# holds weights of its own, about the file's size (packed for the kernels, they cannot be shared): a
# small model keeps dozens, one of gigabytes only the session it runs.
KEPT_BYTES = 2**30
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # in order of preference


class OnnxRuntimeEngine:
    """Runs one ``.onnx`` file on ``num_threads`` CPU threads (None: ONNX Runtime's choice)."""

    def __init__(self, path: Path, num_threads: int | None) -> None:
        self._path, self._num_threads = path, num_threads
        self._weights = OnnxWeights(path)
        session = self._open({})
        self._session: onnxruntime.InferenceSession | None = session
        self._outputs = [output.name for output in session.get_outputs()]
        # Of recent variants, the last one used at the end.
        self._sessions: OrderedDict[Variant, onnxruntime.InferenceSession] = OrderedDict()
        self._sessions[()] = session
        num_bytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
        self._max_sessions = max(1, KEPT_BYTES // max(1, num_bytes))

    def _open(self, weights: Mapping[str, Tensor]) -> onnxruntime.InferenceSession:
        """A session in which ``weights`` stand in for the file's own."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._num_threads or 0
        # Within a call, workers spin from one operator to the next (a third more images/s on two
        # cores, November 2026); between calls they sleep, or they would take the cores from HTTP.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(w.numpy()) for w in weights.values()]
        if values:
            options.add_external_initializers(list(weights), values)
        # CUDA where the installed onnxruntime is a GPU build and finds a device.
        available = onnxruntime.get_available_providers()
        providers = [name for name in PROVIDERS if name in available]
        return onnxruntime.InferenceSession(str(self._path), options, providers=providers)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._session is not None, "closed"
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        try:
            results = self._session.run(self._outputs, arrays)
        except RuntimeException as error:
            if "allocate memory" in str(error):
                raise MemoryError(str(error).splitlines()[0]) from error
            raise
        return {
            name: torch.from_numpy(array)
            for name, array in zip(self._outputs, results, strict=True)
        }

    def weight(self, name: str) -> Tensor:
        return self._weights[name]

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        if variant not in self._sessions:
            self._session = None  # room first: there may be memory for one of a large model
            while len(self._sessions) >= self._max_sessions:
                self._sessions.popitem(last=False)
            self._sessions[variant] = self._open(weights())
        self._sessions.move_to_end(variant)
        self._session = self._sessions[variant]

    def close(self) -> None:
        self._session = None
        self._sessions.clear()
