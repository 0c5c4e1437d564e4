"""Attention as one operator of ONNX Runtime's, in place of the seven that an export makes of it.

The seven write every score to memory and read it again three times: 0.5 GB in each of the five
widest layers of SD 1.5 at 512 px. The one (``com.microsoft.MultiHeadAttention``) works block by
block and keeps none. Attention with a mask, as of text encoders, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx.numpy_helper
from onnx import GraphProto, NodeProto, TensorProto
from onnx.helper import get_node_attr_value, make_node, make_opsetid

DOMAIN = "com.microsoft"
OPSET = make_opsetid(DOMAIN, 1)
BY_HEAD = [0, 2, 1, 3]  # [B, L, heads, D] to [B, heads, L, D] and back
# From the factor of the keys back to the product that made them: transposed by way of 3 dimensions.
KEYS = ("Reshape", "Transpose", "Reshape")


class _Heads(NamedTuple):
    """What was divided into heads, ``[B, L, heads · D]``, and how."""

    whole: str
    num_heads: int


class _Graph:
    """Who makes a value, who takes it, and what is constant."""

    def __init__(self, graph: GraphProto) -> None:
        self.made = {output: node for node in graph.node for output in node.output}
        self.taken: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.taken.setdefault(name, []).append(node)
        self._tensors: Mapping[str, TensorProto] = {each.name: each for each in graph.initializer}

    def constant(self, name: str) -> np.ndarray | None:
        """A small one's value: of a weight in a file beside the graph there is none."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        value: np.ndarray = onnx.numpy_helper.to_array(tensor)
        return value

    def before(self, name: str, *kinds: str) -> NodeProto | None:
        """The node at the end of a chain of ``kinds`` that leads back from ``name``."""
        node = None
        for kind in kinds:
            node = self.made.get(name)
            if node is None or node.op_type != kind:
                return None
            name = node.input[0]
        return node

    def only_after(self, node: NodeProto, kind: str) -> NodeProto | None:
        """What alone takes a node's output, if it is of a kind."""
        after = self.taken.get(node.output[0], [])
        return after[0] if len(after) == 1 and after[0].op_type == kind else None


def fuse_attention(graph: GraphProto) -> int:
    """Rewrite ``graph`` in place; the number of attentions that were found."""
    known, fused = _Graph(graph), {}
    for node in graph.node:
        if node.op_type == "Softmax" and (found := _attention(known, node)):
            fused[found.output[0]] = found
    if fused:
        nodes = [fused.get(node.output[0], node) for node in graph.node]
        del graph.node[:]
        graph.node.extend(_needed(nodes, [output.name for output in graph.output]))
    return len(fused)


def _attention(known: _Graph, softmax: NodeProto) -> NodeProto | None:
    """What stands for all of it; None of another form."""
    scores = known.before(softmax.input[0], "MatMul")
    mixed = known.only_after(softmax, "MatMul")
    if scores is None or mixed is None or mixed.input[0] != softmax.output[0]:
        return None
    query, query_scale = _scaled(known, scores.input[0])
    key, key_scale = _scaled(known, scores.input[1])
    keys = known.before(key, *KEYS)
    by_row = known.only_after(mixed, "Transpose")
    joined = known.only_after(by_row, "Reshape") if by_row is not None else None
    if keys is None or by_row is None or joined is None or not _swaps_heads(by_row):
        return None
    parts = [_heads(known, each) for each in (query, keys.input[0], mixed.input[1])]
    if any(part is None for part in parts) or len({p.num_heads for p in parts if p}) > 1:
        return None
    return make_node(
        "MultiHeadAttention",
        [part.whole for part in parts if part],
        [joined.output[0]],
        domain=DOMAIN,
        num_heads=next(part.num_heads for part in parts if part),
        scale=query_scale * key_scale,
    )


def _scaled(known: _Graph, name: str) -> tuple[str, float]:
    """What is multiplied by a constant, and that; 1 where nothing is."""
    node = known.made.get(name)
    if node is None or node.op_type != "Mul":
        return name, 1.0
    factor = known.constant(node.input[1])
    if factor is None or factor.size != 1:
        return name, 1.0
    return node.input[0], float(factor.item())


def _heads(known: _Graph, name: str) -> _Heads | None:
    """``[B, heads, L, D]`` as it was before it was divided."""
    swapped = known.before(name, "Transpose")
    divided = known.before(name, "Transpose", "Reshape")
    if swapped is None or divided is None or not _swaps_heads(swapped):
        return None
    num_heads = _side(known, divided.input[1], 2)
    return None if num_heads is None else _Heads(divided.input[0], num_heads)


def _side(known: _Graph, shape: str, index: int) -> int | None:
    """One of the four sides of a shape, whole or put together, where it is constant."""
    value = known.constant(shape)
    if value is None:
        joined = known.made.get(shape)
        if joined is None or joined.op_type != "Concat" or len(joined.input) != 4:
            return None
        value, index = known.constant(joined.input[index]), 0
    return int(value[index]) if value is not None and value.size > index else None


def _swaps_heads(node: NodeProto) -> bool:
    return list(get_node_attr_value(node, "perm")) == BY_HEAD


def _needed(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
    """Nodes that an output depends on, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]
