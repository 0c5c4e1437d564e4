"""Stage 11: things that move. A motion adapter on the student, which stays as it is.

The adapter learns, on painted clips, to say at the student's own timesteps what a clip's frames
are, which consistency models are asked too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engines.distill.captions import caption, paraphrase
from engines.distill.consistency import (
    Solver,
    draw_guidance,
    guidance_embedding,
    pseudo_huber,
)
from engines.distill.moving import NUM_FRAMES, frames_of
from engines.distill.networks import (
    GUIDANCE_WIDTH,
    build_motion_adapter,
    noise_schedule,
    prepare_for_training,
)
from engines.distill.painter import paint
from engines.distill.samples import tokenize
from engines.distill.training import Course, Draws, Place, train
from engines.distill.vae import encode
from engines.distill.world import draw_scene
from engines.motion_unet import join

COURSE = Course(num_steps=700, batch_size=4, learning_rate=2e-3, warmup_steps=20, average=0.98)
NUM_CLIPS = 534
CANONICAL_SHARE = 0.5  # of captions; the others are paraphrases
FIRST_SHARE = 0.5  # of rows
PAINTED_AT_ONCE = 64


class ClipData:
    """Latents of painted clips, and how a step draws its batch from them."""

    def __init__(self, vae: Any, place: Place) -> None:
        count = place.count(NUM_CLIPS)
        rng = np.random.default_rng((place.seed, NUM_FRAMES))
        self._scenes = [draw_scene(rng) for _ in range(count)]
        file = place.folder / f"clips-{count}-{place.seed}.pt"
        if not file.exists():
            latents = self._encode(vae, place) * vae.config.scaling_factor
            partial = file.with_suffix(".partial")
            torch.save(latents.half(), partial)
            partial.replace(file)
        self._latents: Tensor = torch.load(file, weights_only=True)  # [N, F, 4, h, w]

    def _encode(self, vae: Any, place: Place) -> Tensor:
        found = []
        for begin in tqdm(range(0, len(self._scenes), PAINTED_AT_ONCE), desc="paint clips"):
            scenes = self._scenes[begin : begin + PAINTED_AT_ONCE]
            frames = [paint(frame) for scene in scenes for frame in frames_of(scene)]
            found.append(encode(vae, np.stack(frames), place))
        latents = torch.cat(found)
        return latents.reshape(-1, NUM_FRAMES, *latents.shape[1:])

    def draw(self, rng: np.random.Generator, rows: int) -> tuple[Tensor, list[str]]:
        """Latents float32 ``[B, 4, F, h, w]``, and a caption of each."""
        index = rng.integers(len(self._scenes), size=rows)
        texts = [
            caption(scene) if rng.random() < CANONICAL_SHARE else paraphrase(scene, rng)
            for scene in (self._scenes[each] for each in index)
        ]
        return self._latents[torch.from_numpy(index)].float().transpose(1, 2), texts


def train_motion(
    course: Course, place: Place, data: ClipData, tokenizer: Any, encoder: Any, student: Any
) -> Any:
    """Train and return the MotionAdapter; ``student``, the LCM's UNet, stays.

    The loss is how far the student's x0 of every frame is from the painted one, at timesteps of
    the solver's grid, more often at that of a clip's first step: how it moves is decided there.
    """
    torch.manual_seed(place.seed)
    adapter = build_motion_adapter(NUM_FRAMES)
    whole = join(prepare_for_training(student, place.device), adapter.to(place.device))
    parameters = [p for name, p in whole.named_parameters() if ".motion_modules." in name]
    whole.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    schedule = noise_schedule()
    solver = Solver(schedule.alphas_cumprod.to(place.device))

    def loss_of(draws: Draws) -> Tensor:
        latents, texts = data.draw(draws.numpy, course.batch_size)  # [B, 4, F, h, w]
        latents, rows = latents.to(place.device), len(texts)
        noise = torch.randn(latents.shape, generator=draws.torch).to(place.device)
        t = solver.draw_timesteps(rows, draws.torch)
        first = torch.rand(rows, generator=draws.torch) < FIRST_SHARE
        t = torch.where(first.to(place.device), solver.last_timestep, t)
        w = draw_guidance(rows, draws.torch).to(place.device)
        noisy = schedule.add_noise(latents, noise, t)
        with torch.no_grad():
            embeds = encoder(tokenize(tokenizer, texts).to(place.device))[0]  # [B, 32, 96]
        repeated = embeds.repeat_interleave(NUM_FRAMES, dim=0)
        with place.autocast():
            cond = guidance_embedding(w, GUIDANCE_WIDTH)
            velocity = whole(noisy, t, repeated, timestep_cond=cond).sample.float()
        by_frame = [each.transpose(1, 2).flatten(0, 1) for each in (noisy, velocity, latents)]
        noisy, velocity, latents = by_frame  # [B F, 4, h, w]
        denoised = solver.denoised(noisy, velocity, t.repeat_interleave(NUM_FRAMES))
        return pseudo_huber(denoised, latents)

    train("motion", course, place, parameters, loss_of)
    state = whole.state_dict()
    adapter.load_state_dict({name: state[name] for name in adapter.state_dict()})
    return adapter.eval().requires_grad_(False)
