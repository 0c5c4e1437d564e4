"""The quick graph computes what torch computes, through the engine that runs it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch.nn import functional

from engines.backends.cpu_graph import quick_graph
from engines.backends.onnxruntime_engine import Cores, OnnxRuntimeEngine
from engines.build.export import export_onnx
from engines.drawing.model import prepare
from engines.families.part import Part
from engines.order import Order


def write(folder: Path, num_groups: int, scale: torch.Tensor, bias: torch.Tensor) -> Path:
    """A group norm of ``x`` ``[B, C, h, w]``, its weights in a file beside it."""
    value = helper.make_tensor_value_info
    kind = helper.np_dtype_to_tensor_dtype(scale.numpy().dtype)
    node = helper.make_node(
        "GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=num_groups, epsilon=1e-5
    )
    graph = helper.make_graph(
        [node], "norm",
        [value("x", kind, ["b", len(scale), "h", "w"])],
        [value("y", kind, ["b", len(scale), "h", "w"])],
        [
            numpy_helper.from_array(scale.numpy(), "scale"),
            numpy_helper.from_array(bias.numpy(), "bias"),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / "part.onnx"
    (folder / "part.onnx.data").unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location="part.onnx.data", size_threshold=0)
    return path


def operators(path: Path) -> list[str]:
    return [
        node.op_type
        for node in onnx.load_from_string(quick_graph(path, few_threads=True)).graph.node
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@settings(deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(2, 9), batch=st.integers(1, 3),
    num_groups=st.integers(1, 4), of_each=st.integers(1, 3), mean=st.floats(-50, 50),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_group_norm_is_torchs(
    folder: Path, rows: int, columns: int, batch: int, num_groups: int, of_each: int, mean: float,
    seed: int,
) -> None:  # fmt: skip
    """Where the mean is far above the deviation, too, and float32 has few digits left."""
    generator = torch.Generator().manual_seed(seed)
    num_channels = num_groups * of_each
    x = torch.randn(batch, num_channels, rows, columns, generator=generator) + mean
    scale, bias = torch.randn(2, num_channels, generator=generator)
    path = write(folder, num_groups, scale, bias)
    assert "GroupNormalization" not in operators(path)
    found = OnnxRuntimeEngine(path, Cores(1)).run({"x": x})["y"]
    exact = functional.group_norm(x.double(), num_groups, scale.double(), bias.double())
    torchs = functional.group_norm(x, num_groups, scale, bias)
    allowed = max(1e-4, 10 * float((torchs - exact).abs().max()))
    assert float((found - exact).abs().max()) <= allowed


def test_half_precision_stays_as_it_is(tmp_path: Path) -> None:
    """Its one operator rounds once; two would round twice."""
    weights = torch.ones(4, dtype=torch.float16)
    assert operators(write(tmp_path, 2, weights, weights)) == ["GroupNormalization"]


@pytest.mark.parametrize("name", ["tiny-lcm", "tiny-demo"])
def test_attention_without_a_mask_is_one_operator(
    name: str, checkpoints: Path, cache_dir: Path
) -> None:
    """All of it; what it computes is held to diffusers by every test that draws."""
    order = Order(str(checkpoints / name), "onnxruntime", cache_dir=cache_dir)
    bundle = prepare(order, lambda *_: None)
    for part in ("denoiser", "vae_decoder", "text_encoder"):
        path = bundle.part(part)
        nodes = onnx.load(path, load_external_data=False).graph.node
        made_by = {output: node.op_type for node in nodes for output in node.output}
        scores = [made_by[node.input[0]] for node in nodes if node.op_type == "Softmax"]
        assert set(scores) == {"Add"} if part == "text_encoder" else "Add" not in scores  # a mask
        after = operators(path)
        # Those by Einsum pool a whole text by one query (`TextTimeEmbedding`).
        assert after.count("MultiHeadAttention") == scores.count("MatMul")
        assert after.count("Softmax") == len(scores) - scores.count("MatMul")


def test_heads_of_any_number_and_length(tmp_path: Path) -> None:
    """A cross-attention with a scale of its own, exported as the parts are."""
    part = Part(
        "attention", _Attention(num_heads=3),
        {"x": torch.randn(2, 10, 24), "y": torch.randn(2, 7, 24)},
        {"x": (("batch", 1), ("rows", 1), None), "y": (("batch", 1), None, None)}, ("out",),
    )  # fmt: skip
    path = tmp_path / "attention.onnx"
    export_onnx(part, path)
    assert "MultiHeadAttention" in operators(path)
    engine = OnnxRuntimeEngine(path, Cores(2))
    for batch, length in ((1, 130), (3, 9)):
        x, y = torch.randn(batch, length, 24), torch.randn(batch, 7, 24)
        found = engine.run({"x": x, "y": y})["out"]
        assert torch.allclose(found, part.module(x, y), atol=1e-5)


class _Attention(torch.nn.Module):
    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (torch.nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        def heads(value: torch.Tensor) -> torch.Tensor:
            return value.view(x.shape[0], -1, self.num_heads, 24 // self.num_heads).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(
            heads(self.q(x)), heads(self.k(y)), heads(self.v(y)), scale=0.3
        )
        return self.o(mixed.transpose(1, 2).reshape(x.shape[0], -1, 24))
