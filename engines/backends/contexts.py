"""Execution contexts of one TensorRT engine, all on one block of scratch memory.

They may share it because they never run at the same time: an engine has one stream. Knows nothing
of buffers, shapes and graphs.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("fourstep.tensorrt")


class Contexts:
    """Makes contexts; with TensorRT-RTX from kernels that earlier processes compiled."""

    def __init__(self, trt: Any, engine: Any, file: Path) -> None:
        """``file`` keeps those kernels."""
        self._engine, self._file, self._cache = engine, file, None
        self._scratch: torch.Tensor | None = None  # uint8, by the first context
        self._config = None
        strategies = getattr(trt, "ExecutionContextAllocationStrategy", None)
        self._shared = getattr(strategies, "USER_MANAGED", None)  # None: each allocates its own
        if not hasattr(trt, "ComputeCapability"):
            return
        self._config = engine.create_runtime_config()
        specialization = trt.DynamicShapesKernelSpecializationStrategy
        self._config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        self._cache = self._config.create_runtime_cache()
        if file.is_file():
            self._cache.deserialize(file.read_bytes())  # of another driver or GPU: left unused
        self._config.set_runtime_cache(self._cache)
        if not hasattr(self._config, "set_execution_context_allocation_strategy"):
            self._shared = None
        elif self._shared is not None:
            self._config.set_execution_context_allocation_strategy(self._shared)

    def make(self) -> Any:
        """A new context; None where TensorRT found no memory for it.

        Raises:
            torch.OutOfMemoryError: there is none for the scratch block.
        """
        if self._config is not None:
            context = self._engine.create_execution_context(self._config)
        elif self._shared is not None:
            context = self._engine.create_execution_context(self._shared)
        else:
            context = self._engine.create_execution_context()
        if context is not None and self._shared is not None:
            if self._scratch is None:  # enough for the largest shape of any profile
                self._scratch = _allocate(max(1, self._engine.device_memory_size_v2))
            context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        return context

    def keep(self) -> None:
        """Write what was compiled so far, for the next process; where it may: a bundle may be on
        a read-only file system, or shared by replicas that write at the same time.
        """
        if self._cache is None:
            return
        partial = self._file.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_bytes(self._cache.serialize())
            partial.replace(self._file)
        except OSError as error:
            logger.warning("kernels that TensorRT-RTX compiled are not kept: %s", error)

    def close(self) -> None:
        """Keep the kernels and free the scratch memory; the contexts must be gone by then."""
        self.keep()
        self._scratch = None


def _allocate(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
