"""An ONNX part in 8 bits: its convolutions and linear layers.

Weights are scaled by channel, activations by range, both static.

A convolution gets Q and DQ around it and the ReLU behind it, which ONNX Runtime runs as one integer
kernel; a linear layer becomes the kernel itself, whose sums leave it as floats. TensorRT's are
others, of convolutions alone (`engines.build.explicit`). Ranges come from calls of a real model
(`engines.drawing.calibrating`). Kept as they were: what reads latents or gives them, or pixels,
whose errors nothing dampens; shortcuts past a block; what reads the prompt (its first token is far
larger than the others); and products of two features.
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
# 24.6 dB of fp32's (median of 12), but for its ten of these and below at 47.5 (2026-11-27).
KEPT = re.compile(r"shortcut|attn2\.to_[kv]|caption_projection|transformer\.proj_out")
MIN_CHANNELS = 16  # latents and pixels have fewer
WATCHED = "watched:"  # how outputs begin that say a range, and end by what they are
RUNTIME = make_opsetid("com.microsoft", 1)  # ONNX Runtime's own operators
Counts = dict[str, int]
Ranges = Mapping[str, tuple[float, float]]  # of a value by its name


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What is quantised: a convolution, or the product of a linear layer."""

    node: NodeProto
    weight: str  # of outputs by inputs
    bias: str | None
    within: NodeProto | None  # what its kernel does too: a ReLU, or the product's bias

    @property
    def is_linear(self) -> bool:
        return bool(self.node.op_type == "MatMul")

    @property
    def output(self) -> str:
        return str((self.within or self.node).output[0])


def _layers(graph: GraphProto, *, linears: bool) -> dict[str, _Layer]:
    """By the node's output; ``linears``: linear layers too."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    used_by = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            used_by[name].append(node)

    def next_one(node: NodeProto, kind: str) -> NodeProto | None:
        users = used_by[node.output[0]]
        return users[0] if [user.op_type for user in users] == [kind] else None

    found = {}
    for node in graph.node:
        layer = None
        if node.op_type == "Conv" and weights.keys() >= set(node.input[1:]):
            bias = node.input[2] if len(node.input) > 2 else None
            layer = _Layer(node, node.input[1], bias, next_one(node, "Relu"))
        elif linears and node.op_type == "MatMul" and (turned := made_by.get(node.input[1])):
            if turned.op_type != "Transpose" or turned.input[0] not in weights:
                continue
            added = next_one(node, "Add")
            width = weights[turned.input[0]].dims[0]
            names = () if added is None else added.input
            bias = next((n for n in names if n in weights and weights[n].dims == [width]), None)
            layer = _Layer(node, turned.input[0], bias, added if bias else None)
        if layer is None or KEPT.search(layer.weight):
            continue
        if min(weights[layer.weight].dims[:2]) >= MIN_CHANNELS:
            found[node.output[0]] = layer
    return found


def watch(path: Path, out: Path, *, linears: bool = True) -> None:
    """Write the part with the ranges of what is to be quantised as outputs more; ``out`` stands in
    the folder of ``path``, whose weights it shares. ``linears``: of linear layers too.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    layers = _layers(graph, linears=linears).values()
    values = {layer.node.input[0] for layer in layers}
    values |= {layer.output for layer in layers if not layer.is_linear}
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
    layers = _layers(graph, linears=linears and not kind)
    within = {each.output for each in layers.values()} - layers.keys()
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        layer = layers.get(node.output[0])
        if layer is None:
            if kind or node.output[0] not in within:
                nodes.append(node)
        elif kind:
            nodes += explicit(graph, node, tensors, ranges[node.input[0]], kind)
        elif layer.is_linear:
            nodes += _product(graph, layer, tensors, ranges)
        else:
            nodes += _convolution(graph, layer, tensors, ranges)
    num_linears = sum(layer.is_linear for layer in layers.values())
    if num_linears:
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
    return {"num_convolutions": len(layers) - num_linears, "num_linears": num_linears}


def _product(
    graph: GraphProto, layer: _Layer, tensors: Mapping[str, TensorProto], ranges: Ranges
) -> Iterator[NodeProto]:
    features = layer.node.input[0]
    rounded, by_channel = _rounded(onnx.numpy_helper.to_array(tensors[layer.weight]))
    scale, zero = _affine(*ranges[features])
    known = {tensor.name for tensor in graph.initializer}

    def constant(name: str, value: np.ndarray) -> str:
        if name not in known:
            graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name

    u8 = f"{features}.u8"  # one for all layers that read it
    quantised = [constant(f"{u8}.scale", scale), constant(f"{u8}.zero", zero)]
    if quantised[0] not in known:
        yield make_node("QuantizeLinear", [features, *quantised], [u8])
    inputs = [
        u8,
        constant(f"{layer.output}.weight", np.ascontiguousarray(rounded.T)),
        quantised[0],
        constant(f"{layer.output}.weight_scale", by_channel),
        quantised[1],
        constant(f"{layer.output}.weight_zero", np.zeros(len(by_channel), np.int8)),
    ]
    if layer.bias is not None:
        inputs.append(layer.bias)
    yield make_node("MatMulIntegerToFloat", inputs, [layer.output], domain=RUNTIME.domain)


def _convolution(
    graph: GraphProto, layer: _Layer, tensors: Mapping[str, TensorProto], ranges: Ranges
) -> Iterator[NodeProto]:
    features, output = layer.node.input[0], layer.output
    rounded, by_channel = _rounded(onnx.numpy_helper.to_array(tensors[layer.weight]))

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{output}.{name}"))
        return f"{output}.{name}"

    scale, zero = _affine(*ranges[features])
    scale_out, zero_out = _affine(*ranges[output])
    quantised = [constant("scale", scale), constant("zero", zero)]
    yield make_node("QuantizeLinear", [features, *quantised], [f"{output}.q"])
    yield make_node("DequantizeLinear", [f"{output}.q", *quantised], [f"{output}.dq"])
    weights = [
        constant("weight", rounded),
        constant("weight_scale", by_channel),
        constant("weight_zero", np.zeros(len(by_channel), np.int8)),
    ]
    yield make_node("DequantizeLinear", weights, [f"{output}.w"], axis=0)
    conv = NodeProto()
    conv.CopyFrom(layer.node)
    del conv.input[:], conv.output[:]
    conv.input.extend([f"{output}.dq", f"{output}.w"])
    if layer.bias is not None:
        bias, bias_scale = onnx.numpy_helper.to_array(tensors[layer.bias]), scale * by_channel
        biases = [
            constant("bias", np.rint(bias / bias_scale).astype(np.int32)),
            constant("bias_scale", bias_scale),
        ]
        yield make_node("DequantizeLinear", biases, [f"{output}.b"], axis=0)
        conv.input.append(f"{output}.b")
    last = f"{output}.y"
    conv.output.append(last)
    yield conv
    if layer.within is not None:
        last = f"{output}.relu"
        yield make_node("Relu", list(conv.output), [last])
    quantised = [constant("scale_out", scale_out), constant("zero_out", zero_out)]
    yield make_node("QuantizeLinear", [last, *quantised], [f"{output}.yq"])
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
