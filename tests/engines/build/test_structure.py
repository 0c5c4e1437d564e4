"""Graphs without weights: shared by what has one structure, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import StableDiffusionPipeline

from engines.build.checkpoint import load_facts, load_pipeline
from engines.build.export import export_onnx
from engines.build.structure import structure_of
from engines.families import family_named
from engines.families.part import Part

Change = Callable[[StableDiffusionPipeline], object]


def _parts(folder: Path, change: Change = lambda pipeline: None) -> dict[str, Part]:
    pipeline = load_pipeline(folder, "fp32")
    change(pipeline)
    facts = load_facts(folder, pipeline)
    return {part.name: part for part in family_named(facts.family).parts(pipeline, facts)}


def _structures(parts: dict[str, Part]) -> dict[str, str | None]:
    return {name: structure_of(part) for name, part in parts.items()}


def _other_weights(pipeline: StableDiffusionPipeline) -> None:
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        count = sum(weight.numel() for weight in module.parameters())
        torch.nn.utils.vector_to_parameters(torch.rand(count), module.parameters())


def test_it_is_not_of_the_weights(checkpoints: Path) -> None:
    one = _structures(_parts(checkpoints / "tiny-sd"))
    assert None not in one.values()
    assert len(set(one.values())) == len(one)
    assert _structures(_parts(checkpoints / "tiny-sd", _other_weights)) == one


def _set(name: str, attribute: str, value: Any) -> Change:
    return lambda pipeline: setattr(pipeline.unet.get_submodule(name), attribute, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipeline: pipeline.unet.register_to_config(freq_shift=1),
        lambda pipeline: pipeline.unet.half(),
        _set("conv_norm_out", "eps", 1e-3),
        _set("conv_in", "padding", (0, 0)),
        _set("", "conv_act", torch.nn.ReLU()),
        _set("time_proj", "downscale_freq_shift", 1.0),
        _set("down_blocks.0.resnets.0", "output_scale_factor", 2.0),
        lambda pipeline: pipeline.unet.register_buffer("table", torch.ones(2)),
        lambda pipeline: pipeline.unet.set_attn_processor(_SlicedAttention()),
    ],
)
def test_whatever_a_module_holds_counts(change: Change, checkpoints: Path) -> None:
    plain = _structures(_parts(checkpoints / "tiny-sd"))
    changed = _structures(_parts(checkpoints / "tiny-sd", change))
    assert changed.pop("denoiser") != plain.pop("denoiser")
    assert changed == plain, "of the other parts nothing has changed"


def test_what_is_not_understood_has_none(checkpoints: Path) -> None:
    def bend(pipeline: StableDiffusionPipeline) -> None:
        factor = 2.0
        pipeline.unet.conv_out.register_forward_hook(lambda *args: args[-1] * factor)

    assert structure_of(_parts(checkpoints / "tiny-sd", bend)["denoiser"]) is None


def test_a_kept_graph_with_other_weights_is_what_a_new_one_is(
    checkpoints: Path, tmp_path: Path
) -> None:
    first, second, anew = (tmp_path / name for name in ("first", "second", "anew"))
    for folder in (first, second, anew):
        folder.mkdir()
    graphs = tmp_path / "graphs"
    other = _parts(checkpoints / "tiny-sd", _other_weights)["text_encoder"]
    export_onnx(other, first / "part.onnx", graphs)
    (kept,) = graphs.glob("*.onnx")
    part = _parts(checkpoints / "tiny-sd")["text_encoder"]
    export_onnx(part, second / "part.onnx", graphs)
    assert list(graphs.glob("*.onnx")) == [kept]
    export_onnx(part, anew / "part.onnx")
    assert onnx.load(second / "part.onnx") == onnx.load(anew / "part.onnx")
    assert onnx.load(second / "part.onnx") != onnx.load(first / "part.onnx")


class _SlicedAttention(torch.nn.Module):
    """Another way through an attention, with what it is told as a plain attribute."""

    slice_size = 2
