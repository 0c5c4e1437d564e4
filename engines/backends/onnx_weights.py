"""The named weights of an ONNX file, read one at a time from the data beside it.

The onnx package is imported with the first weight: a GPU that draws without LoRAs needs none of it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import onnx
    from torch import Tensor


class OnnxWeights:
    """``weights[name]`` is a tensor of the file's own type; KeyError where there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @functools.cached_property
    def _initializers(self) -> dict[str, onnx.TensorProto]:
        import onnx

        graph = onnx.load(self._path, load_external_data=False).graph
        return {tensor.name: tensor for tensor in graph.initializer}

    @property
    def num_bytes(self) -> int:
        """On disk, the graph with them."""
        files = self._path.parent.glob(f"{self._path.name}*")
        return sum(file.stat().st_size for file in files)

    def __contains__(self, name: str) -> bool:
        return name in self._initializers

    def __getitem__(self, name: str) -> Tensor:
        import onnx.numpy_helper

        array = onnx.numpy_helper.to_array(self._initializers[name], str(self._path.parent)).copy()
        if array.dtype.name == "bfloat16":  # of ml_dtypes, which torch does not know
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
