"""The named weights of an ONNX file, read one at a time from the data beside it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx.numpy_helper
import torch

if TYPE_CHECKING:
    from torch import Tensor


class OnnxWeights:
    """``weights[name]`` is a tensor of the file's own type; KeyError where there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @functools.cached_property
    def _initializers(self) -> dict[str, onnx.TensorProto]:
        graph = onnx.load(self._path, load_external_data=False).graph
        return {tensor.name: tensor for tensor in graph.initializer}

    def __getitem__(self, name: str) -> Tensor:
        array = onnx.numpy_helper.to_array(self._initializers[name], str(self._path.parent))
        return torch.from_numpy(array.copy())
