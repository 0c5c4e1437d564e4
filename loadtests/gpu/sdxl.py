"""SDXL's UNet by its shape alone, as one graph: diffusers' own forward, and the fused form of it.

The product does not serve SDXL yet; it can fuse its UNet already.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from engines.backends.fused import fuse
from loadtests.gpu.clocks import device_ms
from loadtests.gpu.plain import Graph
from loadtests.gpu.section import Section
from loadtests.peak import DTYPES, matrix_peak
from loadtests.torch_flops import count_module_flops

SDXL: dict[str, Any] = {  # stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
TINY = SDXL | {
    "sample_size": 8, "cross_attention_dim": 32, "block_out_channels": (32, 32, 64),
    "transformer_layers_per_block": (1, 1, 1), "attention_head_dim": (2, 2, 4),
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 112,
    "norm_num_groups": 8,
}  # fmt: skip
NUM_TIME_IDS = 6
BATCHES = {"cuda": (1, 4), "cpu": (1,)}
MEMORY_GIB = 12  # the weights are 5, a call of four rows some 4 more


class SdxlUnet(torch.nn.Module):
    """One UNet evaluation with SDXL's additional embeddings as plain inputs."""

    def __init__(self, config: dict[str, Any]) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.unet = UNet2DConditionModel(**config)

    def forward(
        self, sample: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor, time_ids: Tensor
    ) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(  # type: ignore[no-any-return]
            sample, timestep, embeds, added_cond_kwargs=added, return_dict=False
        )[0]


def make(config: dict[str, Any], dtype: torch.dtype, device: str) -> SdxlUnet:
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return SdxlUnet(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def inputs(
    config: dict[str, Any], batch: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    side = config["sample_size"]
    times = NUM_TIME_IDS * config["addition_time_embed_dim"]
    pooled = config["projection_class_embeddings_input_dim"] - times
    make_ = functools.partial(torch.randn, dtype=dtype, device=device)
    return {
        "sample": make_(batch, 4, side, side),
        "timestep": torch.linspace(999, 259, batch, device=device),
        "embeds": make_(batch, 77, config["cross_attention_dim"]),
        "pooled": make_(batch, pooled),
        "time_ids": make_(batch, NUM_TIME_IDS),
    }


@torch.inference_mode()
def measure(section: Section) -> None:
    """A UNet call at 1024×1024, channels-last, fp16."""
    device = section.device
    config, precision = (SDXL, "fp16") if device == "cuda" else (TINY, "fp32")
    dtype = DTYPES[precision]
    with section.attempt("SDXL's UNet"):
        if device == "cuda" and torch.cuda.mem_get_info()[0] < MEMORY_GIB * 2**30:
            raise MemoryError(f"less than {MEMORY_GIB} GiB are free")
        row = inputs(config, 1, dtype, "meta")
        flops = count_module_flops(make(config, dtype, "meta"), row)
        peak = matrix_peak(precision, device, None if device == "cuda" else 256)
        unet = make(config, dtype, device)
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for form in ("diffusers, channels-last", "fused"):
            if form == "fused":
                with torch.no_grad():
                    fuse(unet)
            for batch in BATCHES[device]:
                if not section.has_time(f"SDXL, batch {batch}", 3 if device == "cuda" else 0):
                    return
                given = inputs(config, batch, dtype, device)
                graph = Graph(unet, given)
                ms = device_ms(lambda: graph.run(given), device, 0.3 if device == "cuda" else 0.02)  # noqa: B023
                rate = batch * flops / (ms / 1e3)
                section.row(
                    "SDXL's UNet, one graph", form=form, size=f"{8 * config['sample_size']} px",
                    batch=batch, step_ms=ms, tflop=batch * flops / 1e12, share=rate / peak,
                    capture_s=graph.seconds,
                )  # fmt: skip
