"""Exported graphs keep every weight under its own name, whatever its values, and no paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

from engines.build.checkpoint import load_facts, load_pipeline, pipeline_class
from engines.build.export import export_onnx
from engines.families import family_of
from engines.families.part import Part


@pytest.fixture(scope="module")
def part(checkpoints: Path) -> Part:
    """A denoiser in which all norms are equal, as in a checkpoint that was never trained."""
    folder = checkpoints / "tiny-lcm"
    pipeline = load_pipeline(folder, "fp32")
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if "norm" in name:
                weight.fill_(float(name.endswith("weight")))
    parts = family_of(pipeline_class(folder)).parts(pipeline, load_facts(folder, pipeline))
    return next(part for part in parts if part.name == "denoiser")


def test_equal_weights_are_not_merged(
    part: Part, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "denoiser.onnx"
    export_onnx(part, file)
    graph = onnx.load(file).graph
    assert [value.name for value in graph.input] == list(part.example)
    found = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer}
    for name, weight in part.module.named_parameters():
        assert np.array_equal(found[name], weight.detach().numpy()), name
    used = {name for node in graph.node for name in node.input}
    assert {name for name, _ in part.module.named_parameters()} <= used
    assert str(Path(torch.__file__).parent).encode() not in file.read_bytes()
    assert "Skipped" not in capfd.readouterr().err
