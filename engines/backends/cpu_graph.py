"""A graph in the operators that ONNX Runtime is quickest at on a CPU.

The file keeps the group norm that TensorRT has a kernel for. ONNX Runtime has none and makes twenty
operators and a dozen passes over the features of it; a session is opened on two kernels instead.
Both run on one thread each, so on many threads the twenty, which divide, are the better ones.
Attention is `engines.backends.cpu_attention`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import GraphProto, NodeProto, TensorProto
from onnx.helper import get_node_attr_value, make_node

from engines.backends.cpu_attention import OPSET, fuse_attention


def quick_graph(path: Path, *, few_threads: bool) -> bytes:
    """The ``.onnx`` file at ``path`` rewritten, less the weights in the file beside it.

    ``few_threads``: group norms too.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    if fuse_attention(graph) and OPSET not in model.opset_import:
        model.opset_import.append(OPSET)
    if few_threads:
        _quicken_norms(graph)
    return bytes(model.SerializeToString())


def _quicken_norms(graph: GraphProto) -> None:
    in_float = {
        tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT
    }
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "GroupNormalization" and (scale := in_float.get(node.input[1])):
            nodes += _group_norm(graph, node, num_channels=scale.dims[0])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _group_norm(graph: GraphProto, node: NodeProto, num_channels: int) -> Iterator[NodeProto]:
    """Groups are an instance norm's instances; a batch norm of mean 0 and variance 1 is γ·x + β."""
    features, scale, bias = node.input
    (output,) = node.output
    num_groups = get_node_attr_value(node, "num_groups")

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{output}.{name}"))
        return f"{output}.{name}"

    by_group = constant("by_group", np.asarray([0, num_groups, -1]))
    own = [
        constant("group_scale", np.ones(num_groups, np.float32)),
        constant("group_bias", np.zeros(num_groups, np.float32)),
    ]
    moments = [
        constant("mean", np.zeros(num_channels, np.float32)),
        constant("variance", np.ones(num_channels, np.float32)),
    ]
    groups, normal, shape, whole = (f"{output}.{n}" for n in ("groups", "normal", "shape", "whole"))
    epsilon = get_node_attr_value(node, "epsilon")
    yield make_node("Reshape", [features, by_group], [groups])
    yield make_node("InstanceNormalization", [groups, *own], [normal], epsilon=epsilon)
    yield make_node("Shape", [features], [shape])
    yield make_node("Reshape", [normal, shape], [whole])
    yield make_node("BatchNormalization", [whole, scale, bias, *moments], [output], epsilon=0.0)
