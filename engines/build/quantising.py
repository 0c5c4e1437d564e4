"""An ONNX part in 8 bits: its convolutions and linear layers.

Weights are scaled by channel, activations by range, both static.

A convolution gets Q and DQ around it, which ONNX Runtime runs as one integer kernel; a linear layer
becomes the kernel itself, whose sums leave it as floats. TensorRT's are others, of convolutions
alone (`engines.build.explicit`). Ranges come from calls of a real model
(`engines.drawing.calibrating`). Kept as they were: the first and the last convolution, whose errors
nothing dampens, shortcuts past a block, what reads the prompt (its first token is far larger than
the others), and products of two features.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import GraphProto, NodeProto, TensorProto
from onnx.helper import make_node, make_opsetid, make_tensor_value_info

from engines.build.explicit import explicit

# By the weight's name in diffusers. With all 50 of the demo's UNet in 8 bits its images were at
# 24.6 dB of fp32's (median of 12), but for its ten of these at 47.5 (2026-11-27).
KEPT = re.compile(r"conv_in|conv_out|shortcut|quant_conv|attn2\.to_[kv]")
WATCHED = "watched:"  # how outputs begin that say a range, and end by what they are
RUNTIME = make_opsetid("com.microsoft", 1)  # ONNX Runtime's own operators
Counts = dict[str, int]
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


@dataclasses.dataclass(frozen=True)
class _Linear:
    """A product of features and a transposed weight."""

    node: NodeProto
    weight: str  # [outputs, inputs]
    bias: NodeProto | None  # its addition


def _linears(graph: GraphProto) -> dict[str, _Linear]:
    """The linear layers that are quantised, by the product's output."""
    weights = {tensor.name for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    used_by = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            used_by[name].append(node)
    found = {}
    for node in graph.node:
        turned = made_by.get(node.input[1]) if node.op_type == "MatMul" else None
        if turned is None or turned.op_type != "Transpose" or turned.input[0] not in weights:
            continue
        if KEPT.search(turned.input[0]):
            continue
        (product,) = node.output
        users = used_by[product]
        adds = len(users) == 1 and users[0].op_type == "Add" and weights & set(users[0].input)
        found[product] = _Linear(node, turned.input[0], users[0] if adds else None)
    return found


def watch(path: Path, out: Path) -> None:
    """Write the part with the ranges of what is to be quantised as outputs more; ``out`` stands in
    the folder of ``path``, whose weights it shares.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    values = {value for node in _chosen(graph) for value in (node.input[0], node.output[0])}
    values |= {linear.node.input[0] for linear in _linears(graph).values()}
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for value in values.intersection(node.output):  # at once, lest all values be kept
            nodes += _extremes(graph, value)
    for value in values.intersection(value.name for value in graph.input):
        nodes += _extremes(graph, value)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, out)


def _extremes(graph: GraphProto, value: str) -> Iterator[NodeProto]:
    wide = f"{value}.wide"  # there is no such reduction of halves
    yield make_node("Cast", [value], [wide], to=TensorProto.FLOAT)
    for kind in ("Min", "Max"):
        name = f"{WATCHED}{value}:{kind}"
        yield make_node(f"Reduce{kind}", [wide], [name], keepdims=1)
        graph.output.append(make_tensor_value_info(name, TensorProto.FLOAT, None))


def ranges_of(outputs: Mapping[str, tuple[float, float]]) -> Ranges:
    """By value, of the lowest and highest that each watched output gave."""
    names = {name.removeprefix(WATCHED).rpartition(":")[0] for name in outputs}
    return {
        name: (outputs[f"{WATCHED}{name}:Min"][0], outputs[f"{WATCHED}{name}:Max"][1])
        for name in names
    }


def quantise(path: Path, ranges: Ranges, kind: str = "", *, linears: bool = True) -> Counts:
    """Rewrite a part and its weights; what of it is in 8 bits.

    ``kind``: int8 or fp8 as TensorRT takes it, which is convolutions alone; none: as ONNX Runtime
    does, with or without the linear layers.
    """
    model = onnx.load(path)
    graph = model.graph
    chosen = {node.output[0] for node in _chosen(graph)}
    products = _linears(graph) if linears and not kind else {}
    added = {linear.bias.output[0] for linear in products.values() if linear.bias is not None}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        (output, *_) = node.output
        if output in products:
            nodes += _linear_in_8_bits(graph, products[output], tensors, ranges)
        elif output in added:
            continue
        elif output not in chosen:
            nodes.append(node)
        elif kind:
            nodes += explicit(graph, node, tensors, ranges[node.input[0]], kind)
        else:
            nodes += _in_8_bits(graph, node, tensors, ranges)
    if products:
        model.opset_import.append(RUNTIME)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    nodes = [node for node in nodes if used & set(node.output)]  # no weights transposed for nobody
    used = {name for node in nodes for name in node.input}
    del graph.node[:]
    graph.node.extend(nodes)
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=1024)
    return {"num_convolutions": len(chosen), "num_linears": len(products)}


def _linear_in_8_bits(
    graph: GraphProto, linear: _Linear, tensors: Mapping[str, TensorProto], ranges: Ranges
) -> Iterator[NodeProto]:
    features = linear.node.input[0]
    (product,) = linear.node.output
    rounded, by_channel = _rounded(onnx.numpy_helper.to_array(tensors[linear.weight]))
    scale, zero = _affine(*ranges[features])
    known = {tensor.name for tensor in graph.initializer}

    def constant(name: str, value: np.ndarray) -> str:
        if name not in known:
            graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name

    quantised = [constant(f"{features}.scale", scale), constant(f"{features}.zero", zero)]
    if quantised[0] not in known:  # others read it too
        yield make_node("QuantizeLinear", [features, *quantised], [f"{features}.q"])
    inputs = [
        f"{features}.q",
        constant(f"{product}.weight", np.ascontiguousarray(rounded.T)),
        quantised[0],
        constant(f"{product}.weight_scale", by_channel),
        quantised[1],
        constant(f"{product}.weight_zero", np.zeros(len(by_channel), np.int8)),
    ]
    output = product
    if linear.bias is not None:
        inputs += [name for name in linear.bias.input if name != product]
        (output,) = linear.bias.output
    yield make_node("MatMulIntegerToFloat", inputs, [output], domain=RUNTIME.domain)


def _in_8_bits(
    graph: GraphProto, node: NodeProto, tensors: Mapping[str, TensorProto], ranges: Ranges
) -> Iterator[NodeProto]:
    features = node.input[0]
    (output,) = node.output
    weight, bias = (onnx.numpy_helper.to_array(tensors[name]) for name in node.input[1:])
    rounded, by_channel = _rounded(weight)

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


def _rounded(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric, with a scale for each output."""
    by_channel = np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127
    by_channel = np.maximum(by_channel, 1e-12).astype(np.float32)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    return np.rint(weight / by_channel.reshape(shape)).astype(np.int8), by_channel


def _affine(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of uint8 over a range, which has 0 in it."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-12)
    return np.asarray(scale, np.float32), np.asarray(round(-low / scale), np.uint8)
