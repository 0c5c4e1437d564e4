"""The decoder says of each row whether its picture is one, where clamping would hide it."""

from __future__ import annotations

from pathlib import Path

import torch

from engines.build.checkpoint import load_pipeline
from engines.families.vae import VaeDecoder


@torch.inference_mode()
def test_sums_are_finite_where_all_values_are(checkpoints: Path) -> None:
    decoder = VaeDecoder(load_pipeline(checkpoints / "tiny-lcm", "fp16").vae)
    latents = torch.randn(3, 4, 8, 8)
    pixels, sums, _ = decoder(latents)
    assert sums.dtype == torch.float32
    assert sums.shape == (3,)
    assert torch.isfinite(sums).all()
    latents[1] *= 1e6  # beyond 65,504 in the first layer
    broken, sums, _ = decoder(latents)
    assert torch.isfinite(sums).tolist() == [True, False, True]
    assert torch.equal(broken[0], pixels[0])
    assert torch.equal(broken[2], pixels[2])
