"""Half precision against single, part by part, on the shipped weights; and overflow shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from engines.backends.torch_engine import TorchEngine
from engines.cli import app
from engines.drawing.model import load_model
from engines.drawing.parity import Parity, compare
from engines.errors import BundleError
from engines.order import Order

OUTPUTS = {
    "text_encoder.prompt_embeds", "denoiser.next_sample", "denoiser.denoised",
    "vae_decoder.pixels", "vae_decoder.pixel_sums", "vae_decoder.image",
    "tiny_vae_decoder.pixels", "tiny_vae_decoder.pixel_sums", "tiny_vae_decoder.image",
    "vae_encoder.mean", "vae_encoder.std", "tiny_vae_encoder.mean",
}  # fmt: skip


def _results(backend: str, precision: str, cache_dir: Path) -> list[Parity]:
    truth, built = (
        load_model(Order("demo-lcm", *kind, cache_dir, num_threads=1), lambda *_: None)
        for kind in (("onnxruntime", "fp32"), (backend, precision))
    )
    return compare(truth, built, ["a red heart on a white background"])


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_half_precision_is_near_single_in_every_part(backend: str, cache_dir: Path) -> None:
    """torch computes in halves on a CPU; ONNX Runtime stores them and computes many in single."""
    results = _results(backend, "fp16", cache_dir)
    assert {f"{r.part}.{r.output}" for r in results} == OUTPUTS
    for result in results:
        assert result.good, result
        assert result.squared_error > 0 or backend == "onnxruntime", result


def test_the_same_build_is_equal(cache_dir: Path) -> None:
    for result in _results("onnxruntime", "fp32", cache_dir):
        assert result.squared_error == 0
        assert result.num_values > 0


def test_an_overflowing_part_is_named(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As half precision does above 65,504; SDXL's VAE is the known case."""
    sound = TorchEngine.run

    @torch.inference_mode()
    def run(self: TorchEngine, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        answer = sound(self, inputs)
        if "denoised" in answer:
            broken = answer["denoised"].clone()
            broken[0, 0, 0, 0] = torch.inf
            answer["denoised"] = broken
        return answer

    monkeypatch.setattr(TorchEngine, "run", run)
    result = CliRunner().invoke(
        app, ["verify", "demo-lcm", "--engine", "torch", "--cache-dir", str(cache_dir)]
    )
    assert isinstance(result.exception, BundleError)
    assert "denoiser.denoised of demo-lcm is too far from fp32 on torch" in str(result.exception)
    compared = {line.split(".")[0] for line in result.output.splitlines()}
    assert {output.split(".")[0] for output in OUTPUTS} <= compared
