"""Stages 12 and 13: things that move. The words for it, then a motion adapter on the student.

The student and the text encoder of pictures stay as they are. A copy of the encoder learns a few
words more; the adapter learns, on painted clips, to say at the student's own timesteps what a
clip's frames are, which consistency models are asked too.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from engines.distill.consistency import (
    Solver,
    draw_guidance,
    guidance_embedding,
    pseudo_huber,
)
from engines.distill.moving import (
    BACKWARDS,
    MOTIONS,
    NUM_FRAMES,
    STILL,
    draw_clip,
    frames_of,
    moving_caption,
    moving_paraphrase,
)
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

WORDS_COURSE = Course(
    num_steps=300, batch_size=64, learning_rate=1e-3, warmup_steps=20, average=0.98
)
COURSE = Course(num_steps=700, batch_size=4, learning_rate=2e-3, warmup_steps=30, average=0.99)
NUM_CLIPS = 1_600
CANONICAL_SHARE = 0.4  # of captions; the others are paraphrases
PICTURE_SHARE = 0.12  # of steps
FIRST_SHARE = 0.5  # of rows
KEEP_WEIGHT = 0.5  # of what motion's words change besides motion
PAINTED_AT_ONCE = 64


def train_words(course: Course, place: Place, tokenizer: Any, encoder: Any, pool: Any) -> Any:
    """A copy of the encoder of pictures that knows motion's words too, returned.

    ``tokenizer`` has these words, after those that ``encoder`` knows. ``pool`` is the student's
    `add_embedding`, by which a prompt reaches every layer: what it makes of a caption must say by
    a linear head how the thing moves, and else be what it makes of the caption without it.
    Captions of pictures keep their embeddings.
    """
    torch.manual_seed(place.seed)
    student = copy.deepcopy(encoder).to(place.device).requires_grad_(True)
    student.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for module in (encoder, pool):
        module.to(place.device).requires_grad_(False)
    with torch.no_grad():
        width = pool(encoder(tokenize(tokenizer, [""]).to(place.device))[0]).shape[1]
    head = nn.Linear(width, len(MOTIONS)).to(place.device)

    def loss_of(draws: Draws) -> Tensor:
        clips = [draw_clip(draws.numpy) for _ in range(course.batch_size)]
        pairs = [moving_paraphrase(*clip, draws.numpy) for clip in clips]
        moving, still = (
            tokenize(tokenizer, [pair[k] for pair in pairs]).to(place.device) for k in range(2)
        )
        labels = torch.tensor([MOTIONS.index(motion) for _, motion in clips]).to(place.device)
        with torch.no_grad():
            before = encoder(still)[0]  # [B, 32, 96]
            pooled_before = pool(before)
        pooled = pool(student(moving)[0])
        # Of rows of one length: the head must not be told by its own size.
        said = F.linear(pooled - pooled_before, F.normalize(head.weight), head.bias)
        changed = F.mse_loss(pooled, pooled_before) + F.mse_loss(student(still)[0], before)
        return F.cross_entropy(said, labels) + KEEP_WEIGHT * changed

    train("motion-words", course, place, [*student.parameters(), *head.parameters()], loss_of)
    return student.eval().requires_grad_(False)


class ClipData:
    """Latents of painted clips, and how a step draws its batch from them.

    A clip run backwards is another clip: what moves right moves left.
    """

    def __init__(self, vae: Any, place: Place) -> None:
        count = place.count(NUM_CLIPS)
        rng = np.random.default_rng((place.seed, NUM_FRAMES))
        forwards = [motion for motion in MOTIONS if motion != STILL and motion > BACKWARDS[motion]]
        self._motions = [forwards[index % len(forwards)] for index in range(count)]
        self._scenes = [draw_scene(rng) for _ in range(count)]
        file = place.folder / f"clips-{count}-{place.seed}.pt"
        if not file.exists():
            latents = self._encode(vae, place) * vae.config.scaling_factor
            partial = file.with_suffix(".partial")
            torch.save(latents.half(), partial)
            partial.replace(file)
        self._latents: Tensor = torch.load(
            file, weights_only=True
        )  # [N, F + 1, 4, h, w]: the last stands still

    def _encode(self, vae: Any, place: Place) -> Tensor:
        found = []
        for begin in tqdm(range(0, len(self._scenes), PAINTED_AT_ONCE), desc="paint clips"):
            end = begin + PAINTED_AT_ONCE
            clips = zip(self._scenes[begin:end], self._motions[begin:end], strict=True)
            frames = [paint(each) for clip in clips for each in (*frames_of(*clip), clip[0])]
            found.append(encode(vae, np.stack(frames), place))
        latents = torch.cat(found)
        return latents.reshape(-1, NUM_FRAMES + 1, *latents.shape[1:])

    def draw(self, rng: np.random.Generator, rows: int) -> tuple[Tensor, list[str]]:
        """Latents float32 ``[B, 4, F, h, w]``, and a caption of each.

        Now and then they are pictures, of one frame, so that these can be asked for too.
        """
        alone = rng.random() < PICTURE_SHARE
        clips, texts = [], []
        for index in rng.integers(len(self._scenes), size=rows).tolist():
            *clip, at_rest = self._latents[index].float()
            scene, motion = self._scenes[index], self._motions[index]
            if alone or rng.random() < 1 / len(MOTIONS):
                clip, motion = [at_rest] * (1 if alone else NUM_FRAMES), STILL
            elif rng.random() < 0.5:
                clip, motion = clip[::-1], BACKWARDS[motion]
            canonical = rng.random() < CANONICAL_SHARE
            paraphrased = moving_paraphrase(scene, motion, rng)[0]
            texts.append(moving_caption(scene, motion) if canonical else paraphrased)
            clips.append(torch.stack(clip, dim=1))
        return torch.stack(clips), texts


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
        latents, (rows, _, frames) = latents.to(place.device), latents.shape[:3]
        noise = torch.randn(latents.shape, generator=draws.torch).to(place.device)
        t = solver.draw_timesteps(rows, draws.torch)
        first = torch.rand(rows, generator=draws.torch) < FIRST_SHARE
        t = torch.where(first.to(place.device), solver.last_timestep, t)
        w = draw_guidance(rows, draws.torch).to(place.device)
        noisy = schedule.add_noise(latents, noise, t)
        with torch.no_grad():
            embeds = encoder(tokenize(tokenizer, texts).to(place.device))[0]  # [B, 32, 96]
        repeated = embeds.repeat_interleave(frames, dim=0)
        with place.autocast():
            cond = guidance_embedding(w, GUIDANCE_WIDTH)
            velocity = whole(noisy, t, repeated, timestep_cond=cond).sample.float()
        by_frame = [each.transpose(1, 2).flatten(0, 1) for each in (noisy, velocity, latents)]
        noisy, velocity, latents = by_frame  # [B F, 4, h, w]
        denoised = solver.denoised(noisy, velocity, t.repeat_interleave(frames))
        return pseudo_huber(denoised, latents)

    train("motion", course, place, parameters, loss_of)
    state = whole.state_dict()
    adapter.load_state_dict({name: state[name] for name in adapter.state_dict()})
    return adapter.eval().requires_grad_(False)
