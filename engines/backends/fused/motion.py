"""What a GPU asks of diffusers' UNet of clips beside its own forward: batches that can be counted.

Attention over frames has a row for every place of every picture, 16,384 of a clip of 1024 px; the
kernels that torch has for it take 65,535 and fail above (pytorch/pytorch#146704 and #181085).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

MAX_ROWS = 2**15  # half of what fails, so that two parts of a size share a plan


class PartedAttention(AttnProcessor2_0):  # type: ignore[misc]
    """The attention of each row to itself, some rows after the others where there are many."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """``[B, L, C]`` → ``[B, L, C]``"""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("motion modules attend to frames alone, without a mask")
        found = [
            super(PartedAttention, self).__call__(attn, part, temb=temb)
            for part in torch.split(hidden_states, MAX_ROWS)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


def part_attention(unet: nn.Module) -> int:
    """Part the attention of a UNet's motion modules; how many there are."""
    found: list[Any] = [
        module
        for name, module in unet.named_modules()
        if "motion_modules." in name and isinstance(module, Attention)
        if type(module.processor) is AttnProcessor2_0
    ]
    for attention in found:
        attention.set_processor(PartedAttention())
    return len(found)
