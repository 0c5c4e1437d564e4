"""FLOP of the exported graphs against torch's own count of the same modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.build.checkpoint import load_facts, load_pipeline
from engines.drawing.model import prepare
from engines.families import family_of
from engines.order import Order
from loadtests.flops import count_flops, evaluate
from loadtests.gpu.models import SD15, count_shape
from loadtests.torch_flops import count_part_flops

SIZES = {"batch": 2, "rows": 8, "columns": 8}


def test_flops_are_torchs_count(lcm_checkpoint: Path, cache_dir: Path) -> None:
    order = Order(str(lcm_checkpoint), "onnxruntime", cache_dir=cache_dir)
    bundle = prepare(order, lambda what, done, total: None)
    pipeline = load_pipeline(lcm_checkpoint, "fp32")
    facts = load_facts(lcm_checkpoint, pipeline)
    parts = family_of("LatentConsistencyModelPipeline").parts(pipeline, facts)
    counted = [part for part in parts if part.name in ("text_encoder", "denoiser", "vae_decoder")]
    assert len(counted) == 3
    for part in counted:
        found = count_flops(bundle.part(part.name), SIZES)
        assert found == count_part_flops(part, SIZES), part.name


def test_flops_of_stable_diffusion_are_known_without_its_weights() -> None:
    """0.803 TFLOP a row and step at 512 px: what the shares of a GPU's peak are made of."""
    counts = count_shape(SD15)
    assert counts.step == pytest.approx(0.803e12, rel=0.001)
    assert counts.decode == pytest.approx(2.515e12, rel=0.001)


def test_dimensions_are_arithmetic_over_symbols() -> None:
    assert evaluate("((((rows - 1)//4)) + 1)*8", {"rows": 17}) == 40
    with pytest.raises(ValueError, match="'s7' is not made of rows"):
        evaluate("s7", {"rows": 17})
