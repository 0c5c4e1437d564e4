"""FLOP of the exported graphs against torch's own count of the same modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engines.checkpoint import load_facts, load_pipeline
from engines.families import family_of
from engines.model import prepare
from engines.order import Order
from loadtests.flops import count_flops, evaluate

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
        shapes = {
            name: [
                fixed if dim is None else dim[1] * SIZES[dim[0]]
                for fixed, dim in zip(example.shape, part.dynamic[name], strict=True)
            ]
            for name, example in part.example.items()
        }
        inputs = {
            name: torch.zeros(shapes[name], dtype=example.dtype)
            for name, example in part.example.items()
        }
        # The kernels that torch picks on a CPU are not in its counter's table; their parts are.
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            part.module.eval()(**inputs)
        found = count_flops(bundle.part(part.name), SIZES)
        assert found == counter.get_total_flops(), part.name


def test_dimensions_are_arithmetic_over_symbols() -> None:
    assert evaluate("((((rows - 1)//4)) + 1)*8", {"rows": 17}) == 40
    with pytest.raises(ValueError, match="'s7' is not made of rows"):
        evaluate("s7", {"rows": 17})
