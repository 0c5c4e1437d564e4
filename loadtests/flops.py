"""Floating-point operations of an exported graph, counted from its nodes and shapes.

A multiplication and an addition count as two, as in the papers; only matrix products and
convolutions count, as in `torch.utils.flop_counter`.
"""

from __future__ import annotations

import ast
import contextlib
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
Shapes = Mapping[str, list[int]]


def count_flops(path: Path, sizes: Mapping[str, int]) -> int:
    """Of one run of an ONNX file; ``sizes`` gives its symbols (batch, rows, columns) values.

    Raises:
        ValueError: a shape that the file does not tell, or a symbol without a value.
    """
    sizes = {"chunks": 1, **sizes}  # of texts that fill one window
    graph = _concrete(onnx.load(path, load_external_data=False), sizes).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = [dim.dim_value for dim in dims]
    total = 0
    for node in graph.node:
        if count := COUNTS.get(node.op_type):
            try:
                total += 2 * count(node, shapes)
            except KeyError as error:
                raise ValueError(
                    f"{path.name}: {node.op_type} {node.name} has no shape for {error}"
                ) from error
    return total


def _concrete(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """The model with symbols replaced, and what the exporter left open inferred from the rest."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                with contextlib.suppress(ValueError):  # the exporter's own symbol: to be inferred
                    dim.dim_value = evaluate(dim.dim_param, sizes)
    known = [
        value
        for value in graph.value_info
        if all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    ]
    del graph.value_info[:]
    graph.value_info.extend(known)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """An exporter's dimension: integers and symbols with +, -, *, // between them."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.BinOp(left, op, right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise ValueError(f"dimension {expression!r} is not made of {', '.join(sizes)}")

    return value(ast.parse(expression, mode="eval").body)


def _conv(node: onnx.NodeProto, shapes: Shapes) -> int:
    weight = shapes[node.input[1]]  # [out, in / groups, *kernel]
    return math.prod(shapes[node.output[0]]) * math.prod(weight[1:])


def _matmul(node: onnx.NodeProto, shapes: Shapes) -> int:
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: onnx.NodeProto, shapes: Shapes) -> int:
    rows, columns = shapes[node.input[0]]
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(shapes[node.output[0]]) * (rows if transposed else columns)


def _einsum(node: onnx.NodeProto, shapes: Shapes) -> int:
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation")
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    labels: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        labels |= dict(zip(term, shapes[name], strict=True))
    return math.prod(labels.values())


COUNTS: dict[str, Callable[[onnx.NodeProto, Shapes], int]] = {
    "Conv": _conv,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
}
