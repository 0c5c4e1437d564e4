"""Stages 3 and 4: the teacher. A latent diffusion model with classifier-free guidance.

First a draft, which sees mostly noise and learns what goes where; then the teacher itself, from
the draft, at all timesteps alike. The draft alone loses at low noise what it drew before: of 50
steps' pictures 79 % had the right colour, of a one-step student's 92 %.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.distill.networks import build_unet, noise_schedule, prepare_for_training
from engines.distill.samples import SIZES, make_samples, tokenize
from engines.distill.training import Course, Draws, Place, train
from engines.distill.vae import encode

DRAFT_COURSE = Course(
    num_steps=8_000, batch_size=64, learning_rate=1.2e-3, weight_decay=1e-3, average=0.999
)
COURSE = Course(
    num_steps=8_000, batch_size=64, learning_rate=1e-3, weight_decay=1e-3, average=0.999
)
NATIVE_SHARE = 0.8  # of the steps are at 128 x 128 px
UNCONDITIONAL_SHARE = 0.1  # of the rows have an empty prompt: what guidance steers away from


@dataclasses.dataclass(frozen=True)
class LatentSamples:
    """One size: scaled ``latents`` float32 [N, 4, h, w], ``token_ids`` int64 [N, C, L]."""

    latents: Tensor
    token_ids: Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a denoising loss needs; all on the training device."""

    latents: Tensor  # [B, 4, h, w], scaled
    token_ids: Tensor  # [B, L]
    noise: Tensor  # as latents
    native: bool


class LatentData:
    """Latents of every size, and how a step draws its batch from them."""

    def __init__(self, vae: Any, tokenizer: Any, place: Place, style: str = "plain") -> None:
        self._place = place
        self._empty = tokenize(tokenizer, [""])[0]
        self._sets: list[LatentSamples] = []
        for size_px, count in SIZES.items():
            name = f"latents-{style}-{size_px[0]}x{size_px[1]}-{place.count(count)}.pt"
            file = place.folder / name
            if not file.exists():
                samples = make_samples(place, tokenizer, size_px, count, style)
                latents = encode(vae, samples.images, place) * vae.config.scaling_factor
                partial = file.with_suffix(".partial")
                torch.save([latents, torch.from_numpy(samples.token_ids)], partial)
                partial.replace(file)
            self._sets.append(LatentSamples(*torch.load(file, weights_only=True)))

    def draw(self, draws: Draws, batch_size: int, *, unconditional: float = 0.0) -> Batch:
        """One batch of one size; rows of larger pictures are fewer, so that steps cost alike."""
        native = bool(draws.numpy.random() < NATIVE_SHARE)
        chosen = self._sets[0 if native else int(draws.numpy.integers(1, len(self._sets)))]
        area = chosen.latents.shape[-1] * chosen.latents.shape[-2] / 256
        rows = min(batch_size, max(1, round(batch_size / area)))
        index = torch.from_numpy(draws.numpy.integers(len(chosen.latents), size=rows))
        caption = torch.from_numpy(draws.numpy.integers(chosen.token_ids.shape[1], size=rows))
        ids = chosen.token_ids[index, caption]
        ids[torch.from_numpy(draws.numpy.random(rows) < unconditional)] = self._empty
        latents = chosen.latents[index]
        noise = torch.randn(latents.shape, generator=draws.torch)
        device = self._place.device
        return Batch(latents.to(device), ids.to(device), noise.to(device), native)


def compiled_at_native(unet: Any, place: Place) -> Callable[..., Tensor]:
    """The network as a function; compiled for the size that most steps have, if asked for."""
    fast = torch.compile(unet) if place.compile else unet

    def call(latents: Tensor, *args: Tensor, native: bool, **kwargs: Tensor) -> Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last)
        with place.autocast():
            output: Tensor = (fast if native else unet)(latents, *args, **kwargs).sample
        return output.float()

    return call


def denoising_loss(
    course: Course,
    place: Place,
    data: LatentData,
    encoder: Any,
    unet: Any,
    *,
    mostly_noise: bool = False,
) -> Callable[[Draws], Tensor]:
    """The mean squared error of v = α·ε − σ·x0 (arXiv 2202.00512, section 4) over one batch.

    Timesteps are uniform, or with ``mostly_noise`` twice as dense near 999 as on average.
    """
    network = compiled_at_native(unet, place)
    schedule = noise_schedule()

    def loss_of(draws: Draws) -> Tensor:
        batch = data.draw(draws, course.batch_size, unconditional=UNCONDITIONAL_SHARE)
        rows = len(batch.latents)
        share = torch.rand(rows, generator=draws.torch)
        timesteps = (1000 * (share.sqrt() if mostly_noise else share)).long().to(place.device)
        noisy = schedule.add_noise(batch.latents, batch.noise, timesteps)
        target = schedule.get_velocity(batch.latents, batch.noise, timesteps)
        embeds = encoder(batch.token_ids)[0]  # [B, 32, 96]
        return F.mse_loss(network(noisy, timesteps, embeds, native=batch.native), target)

    return loss_of


def train_draft(course: Course, place: Place, data: LatentData, encoder: Any) -> Any:
    """Train and return the draft of the teacher's UNet; the text encoder stays as it is.

    Trained on together at this rate, it forgets what the UNet does not use yet: after 8,000 steps a
    linear probe of its end token read the shape in 53 % of captions, before them in all.
    """
    torch.manual_seed(place.seed)
    unet = prepare_for_training(build_unet(guidance_embedding=False), place.device)
    loss_of = denoising_loss(course, place, data, encoder, unet, mostly_noise=True)
    train("draft", course, place, list(unet.parameters()), loss_of)
    return unet.eval().requires_grad_(False)


def train_base(course: Course, place: Place, data: LatentData, encoder: Any, draft: Any) -> Any:
    """Train the draft on, in place, into the teacher; returned."""
    unet = prepare_for_training(draft, place.device).requires_grad_(True).train()
    place = dataclasses.replace(place, seed=place.seed + 1)  # other draws than the draft's
    loss_of = denoising_loss(course, place, data, encoder, unet)
    train("base", course, place, list(unet.parameters()), loss_of)
    return unet.eval().requires_grad_(False)
