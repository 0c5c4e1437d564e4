"""From latents to pixels: what a row is decoded by, and what a decode has brought it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from engines.drawing import transfers
from engines.drawing.stage import Stage

if TYPE_CHECKING:
    from engines.drawing.drawing import Drawing

PARTS = {"full": "vae_decoder", "tiny": "tiny_vae_decoder"}  # by decoder


class Decoding(NamedTuple):
    """What rows must have in common to share a decode."""

    decoder: str
    latents: tuple[int, ...]  # shape of what is decoded of a row


def latents_of(drawings: Sequence[Drawing]) -> Tensor:
    """float32 ``[B, C, h, w]``: of finished rows what they are, of others what they may become."""
    found = [each.latents if each.stage is Stage.DECODE else each.denoised for each in drawings]
    return torch.stack([tensor for tensor in found if tensor is not None])


def take_pixels(
    drawings: Sequence[Drawing], latents: Tensor, outputs: Mapping[str, Tensor], precision: str
) -> None:
    """Give each row its image, or its preview, of a decoder's outputs for their ``latents``.

    A row whose latents or pixels are no numbers any more gets a ``failure`` instead.
    """
    sums = latents.flatten(1).sum(dim=1)  # finite where all of a row's latents are
    sums_drawn = outputs.get("pixel_sums", sums)  # older bundles have none
    fetched, sums, sums_drawn = transfers.fetch(outputs["pixels"], sums, sums_drawn)
    pixels = fetched.numpy()  # [B, H, W, 3]
    finite, drawn = torch.isfinite(sums).tolist(), torch.isfinite(sums_drawn).tolist()
    for index, drawing in enumerate(drawings):
        if not finite[index]:
            drawing.failure = (
                f"after step {drawing.step_index} the latents are not all finite numbers; a "
                f"checkpoint that overflows in {precision} needs bf16 or fp32"
            )
        elif not drawn[index]:
            drawing.failure = (
                f"the decoder overflowed in {precision} after step "
                f"{drawing.step_index}; this checkpoint's needs bf16 or fp32"
            )
        elif drawing.stage is Stage.DECODE:
            drawing.pixels = pixels[index]
            drawing.latents = drawing.denoised = None
        else:
            drawing.previews.append(pixels[index])
