"""Explicit Q and DQ as TensorRT takes them: what a network's types say, its builder keeps to.

Symmetric, zero point 0: activations by one scale, weights by channel; biases and what a convolution
gives stay in the graph's own type. int8 is for any GPU, fp8 (e4m3) for those of 8.9 and up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto
from onnx.helper import make_node

# The type in 8 bits and its largest number: OCP's e4m3 has no infinity and ends at 448.
TYPES: dict[str, tuple[Any, float]] = {
    "int8": (np.int8, 127.0),
    "fp8": (ml_dtypes.float8_e4m3fn, 448.0),
}


def explicit(
    graph: GraphProto,
    node: NodeProto,
    tensors: Mapping[str, TensorProto],
    range_: tuple[float, float],
    kind: str,
) -> Iterator[NodeProto]:
    """A convolution with Q and DQ before it and its weights in 8 bits, ``kind`` of `TYPES`.

    ``range_`` is that of its input. New constants are added to the graph.
    """
    (output,) = node.output
    weight = onnx.numpy_helper.to_array(tensors[node.input[1]])
    type_, top = TYPES[kind]
    by_channel = _scale(np.abs(weight).reshape(len(weight), -1).max(axis=1), top, weight.dtype)
    spread = by_channel.astype(np.float32).reshape(-1, *(1,) * (weight.ndim - 1))
    rounded = weight.astype(np.float32) / spread
    if kind == "int8":
        rounded = np.rint(rounded).clip(-top, top)
    largest = np.asarray(max(-range_[0], range_[1]))
    constants = {
        "scale": _scale(largest, top, weight.dtype),
        "zero": np.zeros((), type_),
        "weight": rounded.astype(type_),
        "weight_scale": by_channel,
    }
    for name, value in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{output}.{name}"))
    quantised = [f"{output}.scale", f"{output}.zero"]
    yield make_node("QuantizeLinear", [node.input[0], *quantised], [f"{output}.q"])
    yield make_node("DequantizeLinear", [f"{output}.q", *quantised], [f"{output}.dq"])
    weights = [f"{output}.weight", f"{output}.weight_scale"]
    yield make_node("DequantizeLinear", weights, [f"{output}.w"], axis=0)
    conv = NodeProto()
    conv.CopyFrom(node)
    conv.input[0], conv.input[1] = f"{output}.dq", f"{output}.w"
    yield conv


def _scale(largest: np.ndarray, top: float, dtype: Any) -> np.ndarray:
    """Of the largest absolute values, in the graph's type; never below what it tells from 0."""
    least = np.finfo(np.float16).tiny
    scale: np.ndarray = np.maximum(np.asarray(largest, np.float32) / top, least).astype(dtype)
    return scale
