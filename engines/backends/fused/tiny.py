"""diffusers' tiny autoencoder as few, large kernels over the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from engines.backends.fused import ops
from engines.backends.fused.blocks import DoubledConvolution, Unfusable, expect, expect_kind

Step = Callable[[Tensor], Tensor]


class FusedTinyVae(nn.Module):
    """What `AutoencoderTiny` offers to the parts: ``encode`` and ``decode``.

    Agrees with diffusers/models/autoencoders/autoencoder_tiny.py and vae.py, without tiling or
    slicing. A module only by its interface: the parameters stay the source's.
    """

    def __init__(self, vae: Any) -> None:
        """Raises `Unfusable` for a layout that is not known here. ``vae`` is on its device, in its
        type, and stays there."""
        super().__init__()
        self._source = [vae]  # in a list: its parameters are not registered twice
        self.config, self.dtype = vae.config, vae.dtype
        self._encoder = _steps_of(expect_kind(vae.encoder, "EncoderTiny").layers)
        self._decoder = _steps_of(expect_kind(vae.decoder, "DecoderTiny").layers)

    def refresh(self) -> None:
        """Make anew what was made of weights that have changed in place."""
        for step in (*self._encoder, *self._decoder):
            if isinstance(step, DoubledConvolution):
                step.refresh()

    def encode(self, pixels: Tensor, *, return_dict: bool = False) -> tuple[Tensor]:
        """``[N, 3, H, W]`` → latents ``[N, C, h, w]``."""
        return (_run(self._encoder, pixels.add(1).div(2)),)

    def decode(self, latents: Tensor, *, return_dict: bool = False) -> tuple[Tensor]:
        """``[N, C, h, w]`` → ``[N, 3, H, W]``."""
        return (_run(self._decoder, torch.tanh(latents / 3) * 3).mul(2).sub(1),)


class _Convolution:
    def __init__(self, layer: nn.Conv2d, *, relu: bool) -> None:
        expect(layer, groups=1, dilation=(1, 1), padding_mode="zeros")
        self._layer, self._relu = layer, relu

    def __call__(self, x: Tensor) -> Tensor:
        return ops.add(ops.convolve(x, self._layer), self._layer.bias, relu=self._relu)


class _Block:
    """diffusers/models/unets/unet_2d_blocks.py `AutoencoderTinyBlock`."""

    def __init__(self, source: Any) -> None:
        self._first, self._layer = _steps_of(source.conv[:-1]), source.conv[-1]
        self._skip = source.skip if isinstance(source.skip, nn.Conv2d) else None
        if not isinstance(source.fuse, nn.ReLU) or not isinstance(self._layer, nn.Conv2d):
            raise Unfusable("AutoencoderTinyBlock that does not end in a convolution and a ReLU")

    def __call__(self, x: Tensor) -> Tensor:
        hidden = x
        for step in self._first:
            hidden = step(hidden)
        residual = x if self._skip is None else ops.project(x, self._skip)
        return ops.add(ops.convolve(hidden, self._layer), self._layer.bias, residual, relu=True)


def _steps_of(layers: Iterable[nn.Module]) -> list[Step]:
    """A chain of layers, each with what can be done on its way out."""
    steps: list[Step] = []
    left = list(layers)
    while left:
        layer, after = left[0], left[1] if len(left) > 1 else None
        del left[0]
        if isinstance(layer, nn.Conv2d):
            relu = isinstance(after, nn.ReLU)
            steps.append(_Convolution(layer, relu=relu))
            del left[:relu]
        elif isinstance(layer, nn.Upsample) and isinstance(after, nn.Conv2d):
            expect(layer, mode="nearest", size=None, scale_factor=2.0)
            steps.append(DoubledConvolution(after))
            del left[0]
        else:
            steps.append(_Block(expect_kind(layer, "AutoencoderTinyBlock")))
    return steps


def _run(steps: list[Step], x: Tensor) -> Tensor:
    """``[N, C, H, W]`` to the same, channels last in between."""
    x = x.permute(0, 2, 3, 1).contiguous()
    for step in steps:
        x = step(x)
    return x.permute(0, 3, 1, 2)
