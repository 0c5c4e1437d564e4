"""A part's torch module to an ONNX file, with dynamic batch, height and width.

A graph is made without weights, which are filled in as the file is written: a second checkpoint of
the same structure needs no second export.

Weights keep their names: constants are folded everywhere except into a node that reads a named
parameter, so that LoRA fusion and TensorRT refitting find every weight in its own layout.
"""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx_ir
import onnxscript.optimizer
import torch
from filelock import FileLock
from onnxscript import opset18 as op
from torch._ops import OperatorBase, OpOverload
from torch.export import Dim, ExportedProgram
from torch.onnx import OnnxExporterError, ONNXProgram

from engines.build.int8_linear import dequantize_in_onnx
from engines.build.structure import structure_of
from engines.errors import BuildError
from engines.facts import MAX_CHUNKS
from engines.families.part import Part

# What the exporter may take for granted of each dynamic dimension, for it insists on one branch
# where there are two; the graph itself has no limit. diffusers' Upsample2D branches at a batch of
# 64, and a side in latents below 9 comes to 1 when it is halved three times, which broadcasts.
MAX_BATCH, MIN_SIDE, MAX_SIDE = 63, 9, 8192
CLIPS, FRAMES = 7, 8  # of a batch whose pictures are the frames of all its clips
OPSET = 21  # 20 splits GroupNormalization; 23 makes SDPA an op that TensorRT-RTX partly refuses


def export_onnx(part: Part, path: Path, graphs: Path | None = None) -> None:
    """Write ``part`` to ``path`` (weights beside it in ``<path>.data``).

    ``graphs`` is a folder of graphs without weights, by structure: one there is not made again.

    Raises:
        BuildError: the exporter refused the module.
    """
    structure = None if graphs is None else structure_of(part)
    if graphs is None or structure is None:
        model = _graph(part)
    else:
        kept = graphs / f"{structure}.onnx"
        graphs.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                _keep(_graph(part), kept)
        model = onnx_ir.load(kept)
    _fill(model.graph, part)
    onnx_ir.save(model, path, external_data=f"{path.name}.data")


def _keep(model: onnx_ir.Model, path: Path) -> None:
    """Whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        onnx_ir.save(model, Path(folder) / path.name)
        (Path(folder) / path.name).rename(path)


def _fill(graph: onnx_ir.Graph, part: Part) -> None:
    """The module's weights in place of the inputs that stand for them."""
    weights = dict(part.module.named_parameters())
    for value in graph.inputs[len(part.example) :]:
        name = str(value.name)
        value.const_value = onnx_ir.tensor_adapters.TorchTensor(weights[name], name)
        graph.register_initializer(value)
    del graph.inputs[len(part.example) :]


def _graph(part: Part) -> onnx_ir.Model:
    """The part as ONNX; its weights are inputs, after its own."""
    names = {dim[0] for dims in part.dynamic.values() for dim in dims if dim}
    symbols = {name: _symbol(name, "frames" in names) for name in names}
    shapes = {
        name: tuple(Dim.STATIC if dim is None else dim[1] * symbols[dim[0]] for dim in dims)
        for name, dims in part.dynamic.items()
    }
    # The last one warns of each division that it cannot bound, which is the exporter's affair.
    for name in ("torch.onnx", "onnx_ir", "torch.utils._sympy.interp"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # the exporter's own deprecations, not ours to mend
            # Captured here: left to itself the ONNX exporter would do so by the bytecode as well,
            # which takes five times as long.
            captured = torch.export.export(
                part.module.eval(),
                (),
                kwargs=dict(part.example),
                dynamic_shapes=shapes,
                strict=False,
            )
            program = _translated(captured, part, shapes)
    except Exception as error:
        raise BuildError(f"exporting {part.name} to ONNX failed: {error}") from error
    _optimize(program.model, {name for name, _ in part.module.named_parameters()})
    return program.model


def _translated(captured: ExportedProgram, part: Part, shapes: dict[str, Any]) -> ONNXProgram:
    """What was captured in ONNX's operators.

    The exporter always asks for a second trace, in which operators that ONNX has no name for fall
    apart. A UNet or a VAE of diffusers has none, and its export takes half as long without.
    """
    translate = functools.partial(
        torch.onnx.export,
        dynamo=True,
        dynamic_shapes=shapes,  # for the names of the dimensions
        optimize=False,
        opset_version=OPSET,
        input_names=list(part.example),
        output_names=list(part.outputs),
        custom_translation_table={
            torch.ops.aten.repeat_interleave.self_int: _repeat_interleave,
            torch.ops.aten.to.dtype: _to_dtype,
            torch.ops.aten.to.device: _to_device,
            torch.ops.fourstep.dequantize.default: dequantize_in_onnx,
        },
        verbose=False,
    )
    whole = copy.copy(captured)
    whole.__class__ = _Whole
    try:
        program = translate(whole)
    except OnnxExporterError:
        program = translate(captured)
    assert program is not None, "dynamo=True returns a program"
    return program


class _Whole(ExportedProgram):
    """Falls apart only where torch itself has its operators do so, or one writes in place."""

    def run_decompositions(
        self, decomp_table: dict[OperatorBase, Any] | None = None, **options: Any
    ) -> ExportedProgram:
        for node in self.graph.nodes:
            target = node.target
            if isinstance(target, OpOverload) and (
                target in (decomp_table or {}) or target._schema.is_mutable
            ):
                decomposed: ExportedProgram = super().run_decompositions(decomp_table, **options)
                return decomposed
        return self


def _to_dtype(values: Any, dtype: int, *_: Any) -> Any:
    """`Tensor.to` in ONNX, which the second trace would make another operator."""
    return op.Cast(values, to=dtype)


def _to_device(values: Any, _device: Any, dtype: int, *_: Any) -> Any:
    return _to_dtype(values, dtype)


def _repeat_interleave(values: Any, repeats: Any, dim: int = 0, output_size: Any = None) -> Any:
    """Each entry along ``dim`` so many times in ONNX, ``repeats`` being a number of the graph's.

    onnxscript's own (0.7) expands such a number along the dimension before the right one.
    """
    rank = len(values.shape)
    dim %= rank
    count = op.Reshape(repeats, op.Constant(value_ints=[-1]))
    ones = [op.Constant(value_ints=[1] * n) for n in (dim + 1, rank - dim - 1) if n]
    repeated = op.Expand(
        op.Unsqueeze(values, op.Constant(value_ints=[dim + 1])),
        op.Concat(ones[0], count, *ones[1:], axis=0),
    )
    shape = [op.Constant(value_ints=[-1])]
    if dim:
        shape.insert(0, op.Shape(values, start=0, end=dim))
    if dim + 1 < rank:
        shape.append(op.Shape(values, start=dim + 1))
    return op.Reshape(repeated, op.Concat(*shape, axis=0))


def _optimize(model: onnx_ir.Model, weights: set[str]) -> None:
    """Simplify the graph; every weight becomes an input under its own name.

    As constants equal ones (norms of a fresh checkpoint, say) would be merged, and a refit could
    not tell them apart.
    """
    graph = model.graph
    for name in [name for name in graph.initializers if name in weights]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    onnxscript.optimizer.optimize_ir(
        model,
        should_fold=lambda node: (
            False if any(value and value.name in weights for value in node.inputs) else None
        ),
    )
    for node in graph.all_nodes():  # stack traces: paths of this machine, most of a file's bytes
        node.metadata_props.clear()


def _symbol(name: str, of_clips: bool) -> Any:
    if name == "batch":
        return Dim(name, max=CLIPS if of_clips else MAX_BATCH)
    most = {"chunks": MAX_CHUNKS, "frames": FRAMES}
    if name in most:
        return Dim(name, min=1, max=most[name])
    return Dim(name, min=MIN_SIDE, max=MAX_SIDE)
