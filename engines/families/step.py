"""One whole step around a network, the same for every family: its inputs, guidance, sampler.

sample, noise       float32 [B, ...]  latents
previous            float32 [B, ...]  what the step before gave as denoised
timestep, guidance  float32 [B]
coefficients        float32 [B, 7]    see `engines.samplers`
uncond_index        int64 [B]         for each row the row that holds its unconditional prediction,
                                      itself where there is none (its guidance must be 1 then)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from engines.facts import Facts
from engines.families.part import Part

Dims = tuple[tuple[str, int] | None, ...]
BATCH = ("batch", 1)
LATENTS: Dims = (BATCH, None, ("rows", 1), ("columns", 1))


def guided_step(
    predict: Callable[[Tensor], Tensor],
    sample: Tensor,
    coefficients: Tensor,
    noise: Tensor,
    previous: Tensor,
    guidance: Tensor,
    uncond_index: Tensor,
) -> tuple[Tensor, Tensor]:
    """``next_sample, denoised`` float32 as ``sample``, of a network that is given i · sample.

    The arithmetic is float32 whatever the network's own type.
    """
    alone = (-1,) + (1,) * (sample.dim() - 1)
    i, a, b, p, q, r, s = (c.reshape(alone) for c in coefficients.unbind(1))  # [B, 1, ...]
    output = predict(i * sample).float()
    uncond = output.index_select(0, uncond_index)
    output = uncond + guidance.reshape(alone) * (output - uncond)
    next_sample = p * sample + q * output + r * noise + s * previous
    return next_sample, a * sample + b * output


def denoiser_part(
    module: torch.nn.Module, known: Facts, latents: Tensor, conditioning: Mapping[str, Tensor],
    tokenwise: Sequence[str] = (),
) -> Part:  # fmt: skip
    """The part ``denoiser``: ``module.forward`` takes the step's own inputs in the order of
    `guided_step`, with ``timestep`` after ``sample``, and then ``conditioning``, examples of two
    rows, of which the batch varies, and of those that have the latents' the sides, by patches, and
    the frames.
    Those of ``tokenwise``, ``[B, L, ...]``, are of a text in two windows, and may be of more or of
    one.
    """
    patch = known.size_multiple_px // known.vae_scale_factor
    example = {
        "sample": latents,
        "timestep": torch.tensor([999.0, 499.0]),
        "coefficients": torch.rand(2, known.num_coefficients),
        "noise": torch.randn_like(latents),
        "previous": torch.randn_like(latents),
        "guidance": torch.ones(2),
        "uncond_index": torch.arange(2),
        **conditioning,
    }
    frames = (("frames", 1),) * (latents.dim() - 4)
    dynamic: dict[str, Dims] = {
        name: (BATCH, None, *frames, ("rows", patch), ("columns", patch))
        if value.shape[2:] == latents.shape[2:]
        else (BATCH, *(None,) * (value.dim() - 1))
        for name, value in example.items()
    }
    dynamic |= dict.fromkeys(tokenwise, (BATCH, ("chunks", known.max_tokens), None))
    return Part("denoiser", module, example, dynamic, ("next_sample", "denoised"), patch)
