"""diffusers' autoencoder of Stable Diffusion as few, large kernels over the same parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from engines.backends.fused import ops
from engines.backends.fused.blocks import (
    Downsample,
    ResnetBlock,
    Upsample,
    WideAttention,
    expect_kind,
)


class FusedVae(nn.Module):
    """What `AutoencoderKL` offers to the parts: ``decode``, ``encoder``, ``quant_conv``.

    Agrees with diffusers/models/autoencoders/autoencoder_kl.py and vae.py, without tiling or
    slicing.
    """

    def __init__(self, vae: Any) -> None:
        """Raises `Unfusable` for a layout that is not known here. ``vae`` is on its device, in its
        type, and stays there."""
        super().__init__()
        self._source = [vae]  # in a list: its parameters are not registered twice
        self.config, self.dtype = vae.config, vae.dtype
        self._encoder, self._decoder = _Encoder(vae.encoder), _Decoder(vae.decoder)

    def refresh(self) -> None:
        """Make anew what was made of weights that have changed in place."""
        self._decoder.refresh()

    def encoder(self, pixels: Tensor) -> Tensor:
        """``[N, 3, H, W]`` → moments ``[N, 2 C, h, w]``, before the quantising convolution."""
        return self._encoder(pixels.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)

    @property
    def quant_conv(self) -> nn.Module | None:
        return self._source[0].quant_conv  # type: ignore[no-any-return]

    def decode(self, latents: Tensor, *, return_dict: bool = False) -> tuple[Tensor]:
        """``[N, C, h, w]`` → ``[N, 3, H, W]``."""
        (vae,) = self._source
        x = latents.permute(0, 2, 3, 1).contiguous()
        if vae.post_quant_conv is not None:
            x = ops.project(x, vae.post_quant_conv)
        return (self._decoder(x).permute(0, 3, 1, 2),)


class _Ends:
    """The convolutions and the norm at both ends of an encoder or a decoder, and its middle."""

    def __init__(self, source: Any) -> None:
        self._source = source
        middle = expect_kind(source.mid_block, "UNetMidBlock2D")
        self._resnets = [ResnetBlock(each) for each in middle.resnets]
        self._attentions = [
            None if each is None else WideAttention(each) for each in middle.attentions
        ]
        expect_kind(source.conv_norm_out, "GroupNorm")

    def first(self, x: Tensor) -> Tensor:
        return ops.add(ops.convolve(x, self._source.conv_in), self._source.conv_in.bias)

    def middle(self, x: Tensor) -> Tensor:
        x = self._resnets[0](x)
        for attention, resnet in zip(self._attentions, self._resnets[1:], strict=True):
            x = resnet(x if attention is None else attention(x))
        return x

    def last(self, x: Tensor) -> Tensor:
        x = ops.group_norm(x, self._source.conv_norm_out, silu=True)
        return ops.add(ops.convolve(x, self._source.conv_out), self._source.conv_out.bias)


class _Encoder:
    def __init__(self, source: Any) -> None:
        expect_kind(source, "Encoder")
        self._ends = _Ends(source)
        self._levels = []
        for block in source.down_blocks:
            expect_kind(block, "DownEncoderBlock2D")
            samplers = [Downsample(each) for each in block.downsamplers or ()]
            self._levels.append(([ResnetBlock(each) for each in block.resnets], samplers))

    def __call__(self, x: Tensor) -> Tensor:
        x = self._ends.first(x)
        for resnets, samplers in self._levels:
            for resnet in resnets:
                x = resnet(x)
            for sampler in samplers:
                x = sampler(x)
        return self._ends.last(self._ends.middle(x))


class _Decoder:
    def __init__(self, source: Any) -> None:
        expect_kind(source, "Decoder")
        self._ends = _Ends(source)
        self._levels = []
        for block in source.up_blocks:
            expect_kind(block, "UpDecoderBlock2D")
            samplers = [Upsample(each) for each in block.upsamplers or ()]
            self._levels.append(([ResnetBlock(each) for each in block.resnets], samplers))

    def refresh(self) -> None:
        for _, samplers in self._levels:
            for sampler in samplers:
                sampler.refresh()

    def __call__(self, x: Tensor) -> Tensor:
        x = self._ends.middle(self._ends.first(x))
        for resnets, samplers in self._levels:
            for resnet in resnets:
                x = resnet(x)
            for sampler in samplers:
                x = sampler(x, 2 * x.shape[1], 2 * x.shape[2])
        return self._ends.last(x)
