"""OpenVINO, on a CPU: the graphs that ONNX Runtime draws with, quicker where they are in 8 bits.

What stays in floats of such a part, attention above all, is in bf16 then, which ONNX Runtime does
not have on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engines.backends.cpu import multiplies_bf16, sums_8_bits
from engines.backends.engine import Variant
from engines.backends.onnx_weights import OnnxWeights
from engines.backends.variants import KEPT_BYTES, Variants
from engines.errors import BackendUnavailable

# Where that cannot be imported OpenVINO tells nobody that it was: it would, in a process that it
# forks off ours.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino  # noqa: E402


class OpenVinoEngine:
    """Runs one ``.onnx`` file on the CPU, one call at a time, at the shapes that come: the first
    call of each compiles kernels for it.
    """

    def __init__(self, path: Path, num_threads: int | None, *, in_8_bits: bool) -> None:
        """``in_8_bits``: much of the part is; the rest is in bf16 then, where the CPU has it.

        Raises:
            BackendUnavailable: OpenVINO's sums of 8 bits would be wrong on this CPU.
        """
        if in_8_bits and not sums_8_bits():
            raise BackendUnavailable(
                "engine 'openvino' cuts sums of 8 bits on a CPU without VNNI, as this one is: "
                "choose --engine onnxruntime, or another precision"
            )
        self._path, self._weights = path, OnnxWeights(path)
        self._core = openvino.Core()
        self._options = {
            "INFERENCE_PRECISION_HINT": "bf16" if in_8_bits and multiplies_bf16() else "f32",
            "INFERENCE_NUM_THREADS": num_threads or 0,  # 0: all of the machine's
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # replicas side by side would be held to the same cores
        }
        model = self._core.read_model(path)
        # Not of the compiled model, where some have the names of what was before or behind them.
        self._inputs = [each.any_name for each in model.inputs]
        self._outputs = [each.any_name for each in model.outputs]
        self._request: openvino.InferRequest | None = self._compile(model)
        self._variants = Variants(self._request, KEPT_BYTES // max(1, self._weights.num_bytes))

    def _compile(self, model: openvino.Model) -> openvino.InferRequest:
        return self._core.compile_model(model, "CPU", self._options).create_infer_request()

    def _open(self, weights: Mapping[str, Tensor]) -> openvino.InferRequest:
        """Compiled, with ``weights`` in place of the file's own."""
        model = self._core.read_model(self._path)
        constants = {op.friendly_name: op for op in model.get_ops()}
        for name, weight in weights.items():
            changed = openvino.op.Constant(weight.numpy())
            for reader in constants[name].output(0).get_target_inputs():
                reader.replace_source_output(changed.output(0))
        return self._compile(model)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._request is not None, "closed"
        arrays = {name: inputs[name].contiguous().numpy() for name in self._inputs}
        found = self._request.infer(arrays, share_inputs=True)
        return {name: torch.from_numpy(found[index]) for index, name in enumerate(self._outputs)}

    def weight(self, name: str) -> Tensor:
        return self._weights[name]

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._request = None  # room first: there may be memory for one of a large model
        self._request = self._variants.take(variant, lambda: self._open(weights()))

    def close(self) -> None:
        self._request = None
        self._variants.clear()
