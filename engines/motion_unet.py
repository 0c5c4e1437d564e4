"""The UNet of clips: a UNet of pictures with the modules of a motion adapter in it.

It is diffusers' ``UNetMotionModel``, but made of the picture UNet's own layers as they are: that
class builds some that it does not know, and knows no pooled text. Imports diffusers.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNetMotionModel
from torch import Tensor, nn

# Of a UNet of pictures, what the UNet of clips has as well.
LAYERS = ("conv_in", "time_proj", "time_embedding", "conv_norm_out", "conv_act", "conv_out")
OF_A_BLOCK = ("resnets", "attentions", "downsamplers", "upsamplers")
POOLED_TEXT = "text"  # `addition_embed_type` of a UNet whose prompt is pooled into its timestep
KNOWN_ADDITIONS = (None, POOLED_TEXT)


class TextAndTimeEmbedding(nn.Module):
    """What a UNet of pictures adds up itself: the embeddings of its timestep and of its prompt."""

    def __init__(self, time: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.time, self.text = time, text

    def forward(self, timestep: Tensor, condition: tuple[Tensor | None, Tensor]) -> Tensor:
        timestep_cond, prompt_embeds = condition
        embedding: Tensor = self.time(timestep, timestep_cond) + self.text(prompt_embeds)
        return embedding


class PooledTextUNet(UNetMotionModel):  # type: ignore[misc]
    """The UNet of clips of one of pictures that pools the prompt into the timestep's embedding.

    As ``UNet2DConditionModel.get_aug_embed`` of diffusers with ``addition_embed_type`` text. Its
    ``time_embedding`` is a `TextAndTimeEmbedding`.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """``sample`` is ``[B, C, F, h, w]``, ``encoder_hidden_states`` ``[B F, L, D]``."""
        alone = encoder_hidden_states.shape[1:]
        by_row = encoder_hidden_states.reshape(-1, sample.shape[2], *alone)  # [B, F, L, D]
        condition = (timestep_cond, by_row[:, 0])
        return super().forward(sample, timestep, encoder_hidden_states, condition, **more)


def join(unet: Any, adapter: Any) -> Any:
    """The UNet of clips of a UNet's layers and an adapter's weights: these themselves, no copies.

    ``unet`` is of pictures, or of clips, whose own motion modules are left behind.
    """
    pooled = unet.config.addition_embed_type == POOLED_TEXT
    kind = PooledTextUNet if pooled else UNetMotionModel
    with torch.device("meta"):
        whole = kind.from_unet2d(unet, adapter, load_weights=False)
    for name in LAYERS:
        setattr(whole, name, getattr(unet, name))
    if pooled and not isinstance(unet, PooledTextUNet):
        whole.time_embedding = TextAndTimeEmbedding(unet.time_embedding, unet.add_embedding)
    blocks = (
        *zip(whole.down_blocks, unet.down_blocks, strict=True),
        (whole.mid_block, unet.mid_block),
        *zip(whole.up_blocks, unet.up_blocks, strict=True),
    )
    for block, own in blocks:
        for name in OF_A_BLOCK:
            if hasattr(block, name):
                setattr(block, name, getattr(own, name))
    _, unknown = whole.load_state_dict(adapter.state_dict(), strict=False, assign=True)
    assert not unknown, unknown
    assert not any(each.is_meta for each in whole.state_dict().values())
    return whole.eval()
