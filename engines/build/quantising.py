"""Convolutions of an ONNX part in 8 bits: weights by channel, activations by range, both static.

Each gets Q and DQ around it, which ONNX Runtime runs as one integer kernel; TensorRT's are others
(`engines.build.explicit`). Ranges come from calls of a real model (`engines.drawing.calibrating`).
Kept as they were: the first and the last convolution, whose errors nothing dampens, shortcuts past
a block, and all products.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import GraphProto, NodeProto, TensorProto
from onnx.helper import make_node, make_tensor_value_info

from engines.build.explicit import explicit

# By the weight's name in diffusers. With all 50 of the demo's UNet in 8 bits its images were at
# 24.6 dB of fp32's (median of 12), but for its ten of these at 47.5 (2026-11-27).
KEPT = re.compile(r"conv_in|conv_out|shortcut|quant_conv")
WATCHED = "watched:"  # how outputs begin that say a range, and end by what they are
Ranges = Mapping[str, tuple[float, float]]  # of a value by its name


def _chosen(graph: GraphProto) -> list[NodeProto]:
    """The convolutions that are quantised, of plain weights with a bias."""
    weights = {tensor.name for tensor in graph.initializer}
    return [
        node
        for node in graph.node
        if node.op_type == "Conv"
        and len(node.input) == 3
        and weights.issuperset(node.input[1:])
        and not KEPT.search(node.input[1])
    ]


def watch(path: Path, out: Path) -> None:
    """Write the part with the ranges of what is to be quantised as outputs more; ``out`` stands in
    the folder of ``path``, whose weights it shares.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for value in dict.fromkeys(v for n in _chosen(graph) for v in (n.input[0], n.output[0])):
        wide = f"{value}.wide"  # there is no such reduction of halves
        graph.node.append(make_node("Cast", [value], [wide], to=TensorProto.FLOAT))
        for kind in ("Min", "Max"):
            name = f"{WATCHED}{value}:{kind}"
            graph.node.append(make_node(f"Reduce{kind}", [wide], [name], keepdims=1))
            graph.output.append(make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, 1]))
    onnx.save(model, out)


def ranges_of(outputs: Mapping[str, tuple[float, float]]) -> Ranges:
    """By value, of the lowest and highest that each watched output gave."""
    names = {name.removeprefix(WATCHED).rpartition(":")[0] for name in outputs}
    return {
        name: (outputs[f"{WATCHED}{name}:Min"][0], outputs[f"{WATCHED}{name}:Max"][1])
        for name in names
    }


def quantise(path: Path, ranges: Ranges, kind: str = "") -> int:
    """Rewrite a part and its weights; the number of convolutions in 8 bits.

    ``kind``: int8 or fp8 as TensorRT takes it; none: as ONNX Runtime does.
    """
    model = onnx.load(path)
    graph = model.graph
    chosen = {node.output[0]: node for node in _chosen(graph) if node.output[0] in ranges}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.output[0] not in chosen:
            nodes.append(node)
        elif kind:
            nodes += explicit(graph, node, tensors, ranges[node.input[0]], kind)
        else:
            nodes += _in_8_bits(graph, node, tensors, ranges)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=1024)
    return len(chosen)


def _in_8_bits(
    graph: GraphProto, node: NodeProto, tensors: Mapping[str, TensorProto], ranges: Ranges
) -> Iterator[NodeProto]:
    features = node.input[0]
    (output,) = node.output
    weight, bias = (onnx.numpy_helper.to_array(tensors[name]) for name in node.input[1:])
    by_channel = np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127  # symmetric
    by_channel = np.maximum(by_channel, 1e-12).astype(np.float32)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    rounded = np.rint(weight / by_channel.reshape(shape)).astype(np.int8)

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{output}.{name}"))
        return f"{output}.{name}"

    scale, zero = _affine(*ranges[features])
    scale_out, zero_out = _affine(*ranges[output])
    quantised = [constant("scale", scale), constant("zero", zero)]
    yield make_node("QuantizeLinear", [features, *quantised], [f"{output}.q"])
    yield make_node("DequantizeLinear", [f"{output}.q", *quantised], [f"{output}.dq"])
    weights = [constant("weight", rounded), constant("weight_scale", by_channel)]
    yield make_node("DequantizeLinear", weights, [f"{output}.w"], axis=0)
    bias_scale = scale * by_channel
    biases = [
        constant("bias", np.rint(bias / bias_scale).astype(np.int32)),
        constant("bias_scale", bias_scale),
    ]
    yield make_node("DequantizeLinear", biases, [f"{output}.b"], axis=0)
    conv = NodeProto()
    conv.CopyFrom(node)
    del conv.input[:], conv.output[:]
    conv.input.extend([f"{output}.dq", f"{output}.w", f"{output}.b"])
    conv.output.append(f"{output}.y")
    yield conv
    quantised = [constant("scale_out", scale_out), constant("zero_out", zero_out)]
    yield make_node("QuantizeLinear", [f"{output}.y", *quantised], [f"{output}.yq"])
    yield make_node("DequantizeLinear", [f"{output}.yq", *quantised], [output])


def _affine(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of uint8 over a range, which has 0 in it."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-12)
    return np.asarray(scale, np.float32), np.asarray(round(-low / scale), np.uint8)
