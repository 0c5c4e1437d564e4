"""The embedded default: ONNX Runtime, on any CPU. Tensors are shared with torch, not copied."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from torch import Tensor

from engines.backends.cpu import sums_8_bits
from engines.backends.cpu_graph import quick_graph
from engines.backends.engine import Variant
from engines.backends.onnx_weights import OnnxWeights
from engines.backends.variants import KEPT_BYTES, Variants

MAX_CALLS = 2  # side by side, where there are cores for them
FEW_THREADS = 2  # for which a group norm is quicker whole than divided
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # of a graph in memory
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # in order of preference
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class _Sessions:
    """One variant of the model: on all threads together, and on one thread where that is of use."""

    joint: onnxruntime.InferenceSession
    single: onnxruntime.InferenceSession | None


class Cores:
    """The CPU threads of a model: what a call gets of them depends on who else is calling."""

    def __init__(self, num_threads: int | None) -> None:
        """None: all of the machine's."""
        self.wanted = num_threads or 0  # as ONNX Runtime counts: 0 leaves it the choice
        self.num_threads = num_threads or os.cpu_count() or 1
        self._num_calls = 0
        self._lock = threading.Lock()

    @contextmanager
    def share(self) -> Iterator[int]:
        """The number of threads for a call that lasts as long as the context."""
        with self._lock:
            self._num_calls += 1
            num_calls = self._num_calls
        try:
            yield max(1, self.num_threads // num_calls)
        finally:
            with self._lock:
                self._num_calls -= 1


class OnnxRuntimeEngine:
    """Runs one ``.onnx`` file on the CPU.

    A batch with a row for every thread is cut into as many parts, each run by one thread from
    beginning to end: they meet once a call, not after every operator. On two cores that drew a
    fifth to a third more images/s of the demo model (November 2026). Two calls side by side do not
    even meet then, and no core waits for another: a tenth more. It takes the weights twice, so a
    model of gigabytes, whose operators are long, does without.
    """

    def __init__(
        self,
        path: Path,
        cores: Cores,
        device: str = "auto",
        max_calls: int = MAX_CALLS,
        *,
        for_plans: bool = False,
    ) -> None:
        """``device``: as of an order; on any but ``cpu`` a GPU build of the package uses a GPU.

        ``max_calls`` are side by side at most. ``for_plans``: Q and DQ, if there are, are
        TensorRT's, and stay operators of their own.
        """
        self._path, self._cores, self._for_plans = path, cores, for_plans
        self._weights = OnnxWeights(path)
        self._graphs: dict[bool, bytes] = {}
        available = onnxruntime.get_available_providers()  # CUDA where it is a GPU build
        wanted = PROVIDERS[-1:] if device == "cpu" else PROVIDERS
        self._providers = [name for name in wanted if name in available]
        num_bytes = self._weights.num_bytes
        alone = len(self._providers) > 1 or 2 * num_bytes > KEPT_BYTES
        self.max_calls = 1 if alone else min(max_calls, cores.num_threads)
        self._threads = ThreadPoolExecutor(cores.num_threads, "fourstep-onnxruntime")
        self._sessions: _Sessions | None = self._open({})
        self._outputs = [output.name for output in self._sessions.joint.get_outputs()]
        num_bytes *= 2 if self.max_calls > 1 else 1
        self._variants = Variants(self._sessions, KEPT_BYTES // max(1, num_bytes))

    def _open(self, weights: Mapping[str, Tensor]) -> _Sessions:
        """Sessions in which ``weights`` stand in for the file's own."""
        single = self._open_one(weights, 1) if self.max_calls > 1 else None
        return _Sessions(self._open_one(weights, self._cores.wanted), single)

    def _open_one(
        self, weights: Mapping[str, Tensor], num_threads: int
    ) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        # Within a call, workers spin from one operator to the next (a third more images/s on two
        # cores, November 2026); between calls they sleep, or they would take the cores from HTTP.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._for_plans:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        elif not sums_8_bits():
            # Slower, where sums are cut otherwise (and no less slow where they are not).
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 3
        # The file's: a side branch that ends at once, and keeps nothing (`quantising.watch`).
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(w.numpy()) for w in weights.values()]
        if values:
            options.add_external_initializers(list(weights), values)
        graph: str | bytes = str(self._path)
        if self._providers == ["CPUExecutionProvider"]:
            graph = self._quick_graph((num_threads or self._cores.num_threads) <= FEW_THREADS)
            options.add_session_config_entry(WEIGHTS_FOLDER, str(self._path.parent))
        # It takes a zero of fp8's for the lowest number, as it is uint8's, and leaves ReLUs out.
        wrong = {"ReluQuantRewrite"} if self._for_plans else None
        return onnxruntime.InferenceSession(
            graph, options, providers=self._providers, disabled_optimizers=wrong
        )

    def _quick_graph(self, few_threads: bool) -> bytes:
        """Made once for all sessions: every LoRA set opens two."""
        if few_threads not in self._graphs:
            self._graphs[few_threads] = quick_graph(self._path, few_threads=few_threads)
        return self._graphs[few_threads]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        try:
            results = self._run(arrays)
        except RuntimeException as error:
            if "allocate memory" in str(error):
                raise MemoryError(str(error).splitlines()[0]) from error
            raise
        return {
            name: torch.from_numpy(array)
            for name, array in zip(self._outputs, results, strict=True)
        }

    def _run(self, arrays: Arrays) -> list[np.ndarray]:
        assert self._sessions is not None, "closed"
        joint, single = self._sessions.joint, self._sessions.single
        num_rows = len(next(iter(arrays.values())))
        with self._cores.share() as num_threads:
            alone = num_threads == self._cores.num_threads
            if single is None or (alone and num_rows < num_threads):
                return list(joint.run(self._outputs, arrays))
            first, *others = cut(arrays, min(num_rows, num_threads))
            futures = [self._threads.submit(single.run, self._outputs, part) for part in others]
            try:
                found = [single.run(self._outputs, first)]
            finally:
                wait(futures)  # on an error, too: nothing runs on when this has returned
            found += [future.result() for future in futures]
        if not others:
            return list(found[0])
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def weight(self, name: str) -> Tensor:
        return self._weights[name]

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._sessions = None  # room first: there may be memory for one of a large model
        self._sessions = self._variants.take(variant, lambda: self._open(weights()))

    def close(self) -> None:
        self._sessions = None
        self._variants.clear()
        self._threads.shutdown()


def cut(arrays: Arrays, num_parts: int) -> list[Arrays]:
    """A batch in parts of consecutive rows, as even as can be and none empty.

    A row stays with the next one where that is its unconditional half, and ``uncond_index`` counts
    from the start of the part.
    """
    num_rows = len(next(iter(arrays.values())))
    uncond = arrays.get("uncond_index", np.arange(num_rows))
    bounds = [0]
    for index in range(1, num_parts):
        bound = round(index * num_rows / num_parts)
        bound += int(uncond[bound - 1] == bound)
        bounds.append(bound)
    bounds = sorted({*bounds, num_rows})
    parts = []
    for start, end in itertools.pairwise(bounds):
        part = {name: array[start:end] for name, array in arrays.items()}
        if "uncond_index" in part:
            part["uncond_index"] = part["uncond_index"] - start
        parts.append(part)
    return parts
