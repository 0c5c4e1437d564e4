"""The named weights of an ONNX file come back as the module has them, in every precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.backends.adapters import Adapters
from engines.backends.engine import Variant
from engines.backends.onnx_weights import OnnxWeights
from engines.build.checkpoint import load_facts, load_pipeline, pipeline_class
from engines.build.export import export_onnx
from engines.families import family_of
from engines.loras.file import LowRank


class _Unrun:
    """An engine of which only its weights are asked, as a plan's is before it runs."""

    def __init__(self, path: Path) -> None:
        self._weights = OnnxWeights(path)
        self.fused: Mapping[str, Tensor] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def weight(self, name: str) -> Tensor:
        return self._weights[name]

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self.fused = weights()

    def close(self) -> None: ...


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weights_keep_their_type_and_take_a_lora(
    precision: str, checkpoints: Path, tmp_path: Path
) -> None:
    folder = checkpoints / "tiny-sd"
    pipeline = load_pipeline(folder, precision)
    parts = family_of(pipeline_class(folder)).parts(pipeline, load_facts(folder, pipeline))
    part = next(part for part in parts if part.name == "text_encoder")
    export_onnx(part, tmp_path / "part.onnx")
    engine = _Unrun(tmp_path / "part.onnx")
    expected = dict(part.module.named_parameters())
    named = [name for name in expected if "q_proj.weight" in name]
    assert named
    for name in named:
        assert engine.weight(name).dtype == expected[name].dtype
        assert torch.equal(engine.weight(name), expected[name])
    rows, columns = expected[named[0]].shape
    pair = LowRank(torch.randn(2, columns), torch.randn(rows, 2), 0.5)
    lora = {"ink": {"denoiser": {}, "text_encoder": {named[0]: pair}}}
    adapters = Adapters(lora, {"text_encoder": engine, "denoiser": engine})
    adapters.switch((("ink", 1.0),))
    fused = expected[named[0]].float() + pair.delta((rows, columns))
    assert torch.equal(engine.fused[named[0]], fused.to(expected[named[0]].dtype))
