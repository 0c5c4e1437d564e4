"""diffusers' networks as few, large kernels: what a GPU runs in place of their own forward.

`fuse` puts them into a part. Weights stay diffusers' own parameters, by name and by address, so
that a refit in place reaches what is fused of them, and `refresh` what was made of them. Knows
nothing of graphs or batches.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from engines.backends.fused.blocks import Unfusable

logger = logging.getLogger("fourstep.fused")


def fuse(module: nn.Module) -> str:
    """Replace the networks among a part's children by their fused forms, as far as they are known.

    Their parameters are no longer among the part's then: whoever needs them by name looks before,
    and after the part was moved to its device and type.

    Returns:
        Why one was left as it is; empty where none was.
    """
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        ModelMixin,
        PixArtTransformer2DModel,
        UNet2DConditionModel,
        UNetMotionModel,
    )

    from engines.backends.fused.pixart import FusedPixArt
    from engines.backends.fused.tiny import FusedTinyVae
    from engines.backends.fused.unet import FusedMotionUNet, FusedUNet
    from engines.backends.fused.vae import FusedVae
    from engines.motion_unet import PooledTextUNet

    forms = {
        UNet2DConditionModel: FusedUNet, UNetMotionModel: FusedMotionUNet,
        PooledTextUNet: FusedMotionUNet, PixArtTransformer2DModel: FusedPixArt,
        AutoencoderKL: FusedVae, AutoencoderTiny: FusedTinyVae,
    }  # fmt: skip
    for name, child in list(module.named_children()):
        child.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        form = forms.get(type(child))
        if form is None:
            if isinstance(child, ModelMixin):  # of diffusers
                logger.info(
                    "%s draws by its own forward: no %s is fused", name, type(child).__name__
                )
            continue
        try:
            setattr(module, name, form(child))
        except Unfusable as reason:
            logger.warning("%s draws by its own forward: %s is not fused", name, reason)
            return str(reason)
    return ""


def refresh(module: nn.Module) -> None:
    """After a refit of a fused part: what was made of the weights follows them, in place."""
    from engines.backends.fused.tiny import FusedTinyVae
    from engines.backends.fused.unet import FusedUNet
    from engines.backends.fused.vae import FusedVae

    for child in module.children():
        if isinstance(child, FusedUNet | FusedVae | FusedTinyVae):
            child.refresh()
