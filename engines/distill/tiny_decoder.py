"""Stage 8: the tiny decoder again, on what the student draws.

A few-step model's latents are not quite an encoder's. The full decoder, which normalises over the
whole picture, makes of them what was meant; a tiny one that has met an encoder's alone puts blobs
of colour where it knows none. So it learns whole pictures: the full decoder's, of the student's own
latents and, lest it forget them, of painted pictures' in every style.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler
from torch import Tensor
from tqdm import tqdm

from engines.distill.captions import paraphrase
from engines.distill.consistency import NUM_SOLVER_STEPS, draw_guidance, guidance_embedding
from engines.distill.networks import (
    GUIDANCE_WIDTH,
    LATENT_CHANNELS,
    NOISE,
    SIZE_PX,
    VAE_SCALE_FACTOR,
    prepare_for_training,
)
from engines.distill.samples import tokenize
from engines.distill.training import Course, Draws, Place, train
from engines.distill.vae import difference, paint_and_encode
from engines.distill.world import draw_scene

COURSE = Course(num_steps=2_500, batch_size=8, learning_rate=1e-3, average=0.995)
STEPS = (1, 2, 4, 8)  # of the student's pictures, as many of each
NUM_DRAWN = 240  # of each; every step's prediction is kept, which is what previews show
PAINTED_SHARE = 0.02  # of the recipe's painted pictures
DRAWN_SHARE = 0.75  # of a batch's rows are the student's
ROWS = 40  # drawn or decoded at a time


def train_tiny_decoder(
    course: Course, place: Place, tokenizer: Any, encoder: Any, student: Any, vae: Any, tiny: Any
) -> Any:
    """Train the decoder of ``tiny``, an AutoencoderTiny, in place; its encoder stays."""
    torch.manual_seed(place.seed)
    drawn = torch.cat(list(_draw(place, tokenizer, encoder, student)))  # [N, 4, 16, 16]
    few = dataclasses.replace(place, data_share=PAINTED_SHARE * place.data_share)
    painted = torch.cat([latents for _, latents in paint_and_encode(few, tokenizer, vae)])
    sources = [painted * vae.config.scaling_factor, drawn]
    targets = [_decode(vae, latents, place) for latents in sources]  # uint8, of one picture 49 kB
    decoder = tiny.decoder.requires_grad_(True).train().to(memory_format=torch.channels_last)

    def loss_of(draws: Draws) -> Tensor:
        chosen, shown = [], []
        for own in map(int, draws.numpy.random(course.batch_size) < DRAWN_SHARE):
            index = int(draws.numpy.integers(len(sources[own])))
            chosen.append(sources[own][index])
            shown.append(targets[own][index])
        latents = torch.stack(chosen).to(place.device, memory_format=torch.channels_last)
        pixels = torch.stack(shown).to(place.device).float() / 127.5 - 1
        with place.autocast():
            pictures = tiny.decode(latents).sample
        return difference(pictures.float(), pixels)

    train("tiny-decoder", course, place, list(decoder.parameters()), loss_of)
    return tiny.eval().requires_grad_(False)


@torch.no_grad()
def _draw(place: Place, tokenizer: Any, encoder: Any, student: Any) -> Iterator[Tensor]:
    """What the student predicts after every step of every number of steps: float32 [B, 4, h, w].

    Captions and guidance are the training's own, by diffusers' LCMScheduler.
    """
    unet = prepare_for_training(student, place.device)
    rng, generator = np.random.default_rng(place.seed), torch.Generator().manual_seed(place.seed)
    count, side = max(1, round(NUM_DRAWN * place.data_share)), SIZE_PX // VAE_SCALE_FACTOR
    rounds = [(n, min(ROWS, count - at)) for n in STEPS for at in range(0, count, ROWS)]
    for num_steps, rows in tqdm(rounds, desc="draw by the student", unit="batch"):
        texts = [paraphrase(draw_scene(rng), rng) for _ in range(rows)]
        embeds = encoder(tokenize(tokenizer, texts).to(place.device))[0]  # [B, 32, 96]
        guidance = draw_guidance(rows, generator).to(place.device)
        cond = guidance_embedding(guidance, GUIDANCE_WIDTH)
        scheduler = LCMScheduler(**NOISE, original_inference_steps=NUM_SOLVER_STEPS)
        scheduler.set_timesteps(num_steps)
        noise = torch.randn(rows, LATENT_CHANNELS, side, side, generator=generator)
        latents = noise.to(place.device)
        for timestep in scheduler.timesteps:
            with place.autocast():
                velocity = unet(latents, timestep, embeds, timestep_cond=cond).sample
            latents, denoised = scheduler.step(
                velocity.float(), timestep, latents, generator=generator, return_dict=False
            )
            yield denoised.cpu()


@torch.no_grad()
def _decode(vae: Any, latents: Tensor, place: Place) -> Tensor:
    """The full decoder's pictures of scaled latents: uint8 [N, 3, H, W]."""
    pictures = []
    chunks = range(0, len(latents), ROWS)
    for begin in tqdm(chunks, desc="decode by the full decoder", unit="batch"):
        part = latents[begin : begin + ROWS].to(place.device)
        unscaled = part / vae.config.scaling_factor
        with place.autocast():
            drawn = vae.decode(unscaled).sample.float()
        pictures.append(((drawn.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(pictures)
