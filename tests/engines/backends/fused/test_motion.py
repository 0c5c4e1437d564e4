"""Attention over frames in parts, against diffusers' own forward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel

from engines.backends.fused import fuse, motion
from engines.motion_unet import join


@torch.no_grad()
def test_parts_draw_what_the_whole_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    channels = {"block_out_channels": (32, 64)}
    pictures = UNet2DConditionModel(
        **channels, sample_size=8, layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet = join(pictures, MotionAdapter(**channels, motion_layers_per_block=1))
    given = (torch.randn(2, 4, 3, 8, 6), torch.tensor([999.0, 19.0]), torch.randn(6, 5, 32))
    (whole,) = unet(*given, return_dict=False)
    part = torch.nn.Module()
    part.unet = unet
    assert fuse(part) == ""
    sizes: list[int] = []
    attend = motion.AttnProcessor2_0.__call__

    def noted(self: object, attn: object, hidden: torch.Tensor, *rest: object, **more: object):  # type: ignore[no-untyped-def]
        sizes.append(len(hidden))
        return attend(self, attn, hidden, *rest, **more)

    monkeypatch.setattr(motion.AttnProcessor2_0, "__call__", noted)
    monkeypatch.setattr(motion, "MAX_ROWS", 40)  # of 2 · 8 · 6 places in the largest
    (parted,) = unet(*given, return_dict=False)
    assert {40, 96 - 80} <= set(sizes)
    assert torch.allclose(parted, whole, atol=1e-5)


def test_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="without a mask"):
        motion.PartedAttention()(SimpleNamespace(), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
