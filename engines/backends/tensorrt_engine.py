"""The production backend: a plan on an NVIDIA GPU, run by `tensorrt` or `tensorrt_rtx`.

For each batch bucket and size there is one execution context with buffers of its own, captured
into a CUDA graph the first time it runs (at warm-up). A step then copies its inputs into those
buffers on the device and replays the graph; latents never pass through the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.backends.captures import capturing
from engines.backends.contexts import Contexts
from engines.backends.engine import Variant
from engines.backends.onnx_weights import OnnxWeights
from engines.build.plan import MODULES, import_tensorrt, make_logger
from engines.errors import BackendUnavailable, InvalidInput

DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64,
    "INT32": torch.int32, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
logger = logging.getLogger("fourstep.tensorrt")
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
MAX_SLOTS = 64  # shapes that are kept, the last used ones


class TensorRtEngine:
    """Runs one plan, whose ONNX lies beside it; batches are padded to the next of ``batches``."""

    def __init__(
        self, plan: Path, engine: str, batches: tuple[int, ...], *, stripped: bool = False
    ) -> None:
        """Raises BackendUnavailable where this GPU, driver or version does not take the plan."""
        self._trt = trt = import_tensorrt(engine)
        self._log = make_logger(trt)
        self._batches = batches
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise BackendUnavailable(
                f"{MODULES[engine]} {trt.__version__} cannot load {plan} on this GPU: "
                f"{self._log.last_error}; build the bundle again here"
            )
        if stripped:
            self._fill(plan.with_suffix(".onnx"))
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = trt.TensorIOMode.INPUT
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == mode]
        self._outputs = [name for name in names if name not in self._inputs]
        self._types = {n: DTYPES[self._engine.get_tensor_dtype(n).name] for n in names}
        # Not the default one, which cannot be captured.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._slots: dict[Shapes, _Slot] = {}  # the last used one last
        self._weights = OnnxWeights(plan.with_suffix(".onnx"))
        self._replaced: set[str] = set()
        self._contexts = Contexts(trt, self._engine, plan.with_suffix(".runtime-cache"))
        self.num_rows = self.num_padded_rows = 0  # since the engine was made; their ratio is waste

    def _fill(self, onnx: Path) -> None:
        """Give a stripped plan the weights of the graph it was built from."""
        refitter = self._trt.Refitter(self._engine, self._log)
        parser = self._trt.OnnxParserRefitter(refitter, self._log)
        if not (parser.refit_from_file(str(onnx)) and refitter.refit_cuda_engine()):
            raise BackendUnavailable(
                f"the stripped plan beside {onnx} took no weights of it: {self._log.last_error}"
            )

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = len(inputs[self._inputs[0]])
        bucket = next((size for size in self._batches if size >= rows), None)
        if bucket is None:
            raise InvalidInput("batch", rows, f"{rows} rows; this plan takes {self._batches[-1]}")
        self.num_rows += rows
        self.num_padded_rows += bucket - rows
        shapes: Shapes = tuple((n, (bucket, *inputs[n].shape[1:])) for n in self._inputs)
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream())
            known = shapes in self._slots
            slot = self._slots.pop(shapes, None) or self._make_slot(shapes)
            for name, value in inputs.items():
                slot.buffers[name][:rows].copy_(value, non_blocking=True)
            slot.launch()
            self._slots[shapes] = slot  # after it ran: one that found no memory is made anew
            if not known:
                self._contexts.keep()
                self._forget_oldest()
            # Copies, because the next run writes into the same buffers.
            outputs = {name: slot.buffers[name][:rows].clone() for name in self._outputs}
        torch.cuda.default_stream().wait_stream(self._stream)
        return outputs

    def _forget_oldest(self) -> None:
        """Clips may come in more shapes than there is memory for."""
        if len(self._slots) > MAX_SLOTS:
            self._stream.synchronize()  # it may be running
            del self._slots[next(iter(self._slots))]

    def _make_slot(self, shapes: Shapes) -> _Slot:
        context = self._contexts.make()
        if context is None:  # the binding's answer where it finds no memory
            raise _failure("TensorRT made no execution context", self._log)
        handle = self._stream.cuda_stream
        if not context.set_optimization_profile_async(self._profile_for(shapes), handle):
            raise BackendUnavailable(f"TensorRT took no profile: {self._log.last_error}")
        for name, shape in shapes:
            if not context.set_input_shape(name, shape):
                raise _failure(f"TensorRT refused {name} {shape}", self._log)
        buffers = {}
        for name in (*self._inputs, *self._outputs):
            shape = tuple(context.get_tensor_shape(name))
            buffers[name] = torch.zeros(shape, dtype=self._types[name], device="cuda")
            context.set_tensor_address(name, buffers[name].data_ptr())
        return _Slot(context, buffers, self._stream, self._log)

    def _profile_for(self, shapes: Shapes) -> int:
        """The profile that takes these shapes, an exact one before a wide one."""
        fitting = []
        for index in range(self._engine.num_optimization_profiles):
            limits = [
                (shape, *self._engine.get_tensor_profile_shape(name, index))
                for name, shape in shapes
            ]
            if all(_within(low, shape, high) for shape, low, _, high in limits):
                exact = all(tuple(low) == tuple(high) for _, low, _, high in limits)
                fitting.append((not exact, index))
        if not fitting:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes)
            raise InvalidInput(
                "size", listed, f"no profile of this plan takes {listed}; build it with that --size"
            )
        return min(fitting)[1]

    def weight(self, name: str) -> Tensor:
        return self._weights[name]

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        trt = self._trt
        if not self._engine.refittable:
            raise BackendUnavailable(
                "this plan was built without --refit, so no LoRA can be put into it: build it with "
                "--refit, on a machine with a GPU, or serve with --engine torch"
            )
        refitter = trt.Refitter(self._engine, self._log)
        fused = weights()
        kept = []  # alive until the refit is done

        def give(name: str) -> None:
            if name not in fused and name not in self._weights:
                raise BackendUnavailable(f"TensorRT wants {name or 'unnamed weights'} to refit")
            value = (fused[name] if name in fused else self._weights[name]).contiguous()
            kept.append(value)
            kind = next(k for k, dtype in DTYPES.items() if dtype == value.dtype)
            given = trt.Weights(getattr(trt.DataType, kind), value.data_ptr(), value.numel())
            if not refitter.set_named_weights(name, given, trt.TensorLocation.HOST):
                raise BackendUnavailable(f"TensorRT refused {name}: {self._log.last_error}")

        # What the set before changed is set back as well: it would linger otherwise.
        for name in self._replaced | fused.keys():
            give(name)
        for name in refitter.get_missing_weights():  # fused by the builder with those just given
            give(name)
        torch.cuda.synchronize()
        if not refitter.refit_cuda_engine():
            raise BackendUnavailable(f"TensorRT did not refit: {self._log.last_error}")
        self._replaced = set(fused)
        for slot in self._slots.values():
            slot.forget_graph()

    def close(self) -> None:
        self._slots.clear()
        self._contexts.close()
        self._engine = self._runtime = None


def _within(low: Any, shape: tuple[int, ...], high: Any) -> bool:
    sides = zip(low, shape, high, strict=True)
    return all(smallest <= side <= largest for smallest, side, largest in sides)


class _Slot:
    """One shape: a context, its buffers, and the graph captured from them."""

    def __init__(
        self, context: Any, buffers: dict[str, Tensor], stream: torch.cuda.Stream, log: Any
    ) -> None:
        self._context, self.buffers, self._stream, self._log = context, buffers, stream, log
        self._graph: torch.cuda.CUDAGraph | None = None
        self._to_capture = self._capturable = True

    def launch(self) -> None:
        """Run on the current stream; the first time eagerly, then as a graph where that can be.

        Where a capture fails it stays eager, for good: the work itself has been done by then.
        """
        if self._graph is not None:
            self._graph.replay()
            return
        self._execute()
        if not self._to_capture:
            return
        self._stream.synchronize()
        self._to_capture = False
        capturable = getattr(self._context, "is_stream_capturable", lambda handle: True)
        if capturable(self._stream.cuda_stream):
            graph = torch.cuda.CUDAGraph()
            try:
                with capturing(graph, self._stream):
                    self._execute()
                self._graph = graph
            except Exception as error:  # of the driver, TensorRT or torch, in many kinds
                self._capturable = False
                shapes = {name: tuple(buffer.shape) for name, buffer in self.buffers.items()}
                logger.warning("no CUDA graph of %s, which runs without: %s", shapes, error)

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise _failure("TensorRT did not run", self._log)

    def forget_graph(self) -> None:
        self._graph, self._to_capture = None, self._capturable


def _failure(what: str, log: Any) -> Exception:
    kind = torch.OutOfMemoryError if "memory" in log.last_error.lower() else RuntimeError
    return kind(f"{what}: {log.last_error or 'no reason given'}")
