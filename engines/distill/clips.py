"""Scores clips: the checker reads every frame, and the way of the thing through them.

What is asked is drawn from both sides of the split. Trains nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, LCMScheduler, MotionAdapter, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from engines.distill.captions import caption
from engines.distill.checker import Box, read
from engines.distill.consistency import NUM_SOLVER_STEPS, guidance_embedding
from engines.distill.moving import NUM_FRAMES, TRAVEL, frames_of
from engines.distill.networks import GUIDANCE_WIDTH, SIZE_PX, build_motion_adapter
from engines.distill.painter import Floats, Pixels, box, paint
from engines.distill.samples import tokenize
from engines.distill.training import TrainingError
from engines.distill.world import ATTRIBUTES, Scene, draw_scene
from engines.motion_unet import join

MODEL = "demo-motion"
AT_ONCE = 8
ASKED = tuple(name for name in ATTRIBUTES if name != "position")  # which changes on the way
GROWTH = np.log(1.5)  # of what would be told to grow
WAYS = {
    "still": (0, 0, 0), "left": (-1, 0, 0), "right": (1, 0, 0), "up": (0, -1, 0),
    "down": (0, 1, 0), "growing": (0, 0, 1), "shrinking": (0, 0, -1),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClipExam:
    """The same questions for everyone."""

    scenes: tuple[Scene, ...]
    seed: int

    @classmethod
    def of(cls, num_prompts: int, seed: int = 1) -> ClipExam:
        """Half the scenes from each side of the split."""
        rng = np.random.default_rng((seed, num_prompts, NUM_FRAMES))
        scenes = (draw_scene(rng, held_out=index % 2 == 1) for index in range(num_prompts))
        return cls(tuple(scenes), seed)

    @property
    def prompts(self) -> list[str]:
        return [caption(scene) for scene in self.scenes]

    def paint(self) -> Pixels:
        """What is asked for: uint8 ``[N, F, H, W, 3]``."""
        return np.stack([[paint(frame) for frame in frames_of(scene)] for scene in self.scenes])


@dataclasses.dataclass(frozen=True)
class ClipScore:
    """Shares in 0..1, and pixels."""

    frames: float  # of what the checker reads in all frames, right
    whole: float  # of clips, with every frame right in all that is asked
    motion: float  # of clips, moving to the right
    # Of those that have a thing in every frame:
    way_px: float  # mean distance from the way that was asked for, both middles in one place
    jitter_px: float  # mean change, from one frame to the next, of how far the thing went


def score(exam: ClipExam, clips: Pixels) -> ClipScore:
    """Read uint8 ``[N, F, H, W, 3]``, one clip for each of the exam's."""
    right, whole, moving, ways, jitters = [], [], [], [], []
    for scene, frames in zip(exam.scenes, clips, strict=True):
        readings = [read(frame) for frame in frames]
        found = [[reading.agrees(scene, name) for name in ASKED] for reading in readings]
        right += [share for frame in found for share in frame]
        whole.append(bool(np.all(found)))
        boxes = [reading.box for reading in readings if reading.box is not None]
        told = way_of(boxes) if len(boxes) == len(frames) else None
        moving.append(told is not None and kind_of(told) == "right")
        if told is None:
            continue
        truth = way_of([box(frame, SIZE_PX, SIZE_PX) for frame in frames_of(scene)])
        apart = (told - told.mean(axis=0)) - (truth - truth.mean(axis=0))
        ways.append(np.linalg.norm(apart[:, :2], axis=1).mean())
        jitters.append(np.linalg.norm(np.diff(told[:, :2], n=2, axis=0), axis=1).mean())
    means = (float(np.mean(each or [np.nan])) for each in (right, whole, moving, ways, jitters))
    return ClipScore(*means)


def way_of(boxes: list[Box]) -> Floats:
    """The middle of the thing, in pixels, and the logarithm of its size: ``[F, 3]``."""
    left, top, right, bottom = np.array(boxes, np.float32).T
    size = np.maximum(right - left, bottom - top)
    return np.stack([(left + right) / 2, (top + bottom) / 2, np.log(size)], axis=1)


def kind_of(way: Floats) -> str:
    """The kind of motion that a way ``[F, 3]`` is nearest to, by its slope."""
    time = np.linspace(-0.5, 0.5, len(way))
    dx, dy, growth = (time @ way) / (time @ time)  # over the whole clip
    told = np.array([dx / SIZE_PX / TRAVEL, dy / SIZE_PX / TRAVEL, growth / GROWTH])
    return min(WAYS, key=lambda name: float(np.linalg.norm(told - WAYS[name])))


class ClipModel:
    """The published model in float32; with ``without_motion`` its frames know nothing of each other
    and are pictures of the student, one beside the other.
    """

    def __init__(self, models: Path, *, without_motion: bool = False) -> None:
        folder = models / MODEL
        if not folder.is_dir():
            raise TrainingError(f"--models {models} has no {MODEL}; train or copy it there")
        single: dict[str, Any] = {"torch_dtype": torch.float32}
        self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self._encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", **single)
        self._vae = AutoencoderKL.from_pretrained(folder / "vae", **single)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", **single)
        adapter = MotionAdapter.from_pretrained(folder / "motion_adapter", **single)
        self._unet = join(unet, build_motion_adapter(NUM_FRAMES) if without_motion else adapter)
        self._scheduler = folder / "scheduler"

    @torch.inference_mode()
    def draw(self, prompts: list[str], num_steps: int, guidance_scale: float, seed: int) -> Pixels:
        """uint8 ``[N, F, H, W, 3]``; clip ``i`` is seeded ``seed + i``."""
        drawn = [
            self._draw(prompts[k : k + AT_ONCE], num_steps, guidance_scale, seed + k)
            for k in range(0, len(prompts), AT_ONCE)
        ]
        return np.concatenate(drawn)

    def _draw(self, prompts: list[str], num_steps: int, guidance_scale: float, seed: int) -> Pixels:
        rows = len(prompts)
        embeds = self._encoder(tokenize(self._tokenizer, prompts))[0]
        repeated = embeds.repeat_interleave(NUM_FRAMES, dim=0)
        cond = guidance_embedding(torch.full((rows,), guidance_scale - 1), GUIDANCE_WIDTH)
        generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
        side = self._unet.config.sample_size
        latents = torch.stack(
            [torch.randn((4, NUM_FRAMES, side, side), generator=each) for each in generators]
        )
        scheduler = LCMScheduler.from_pretrained(self._scheduler)
        scheduler.set_timesteps(num_steps, original_inference_steps=NUM_SOLVER_STEPS)
        for t in scheduler.timesteps:
            velocity = self._unet(latents, t.expand(rows), repeated, timestep_cond=cond).sample
            latents, denoised = scheduler.step(
                velocity, t, latents, generator=generators, return_dict=False
            )
        frames = denoised.transpose(1, 2).flatten(0, 1) / self._vae.config.scaling_factor
        pixels = self._vae.decode(frames).sample.permute(0, 2, 3, 1)
        found = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        return np.asarray(found.reshape(rows, NUM_FRAMES, *found.shape[1:]))


GUIDANCE = 3.0  # diffusers' guidance_scale (w + 1) of the table's rows, as of pictures'
Row = tuple[str, str, ClipScore]


def examine(models: Path, exam: ClipExam, max_steps: int) -> list[Row]:
    """Names, step counts and scores: of the model, of pictures without motion, of what is asked."""
    model, pictures = ClipModel(models), ClipModel(models, without_motion=True)
    kinds = [(MODEL, model, steps) for steps in (1, 2, 4, 8)]
    kinds.append(("without its adapter", pictures, 4))
    rows = [
        (
            name,
            str(steps),
            score(exam, which.draw(exam.prompts, steps, GUIDANCE, exam.seed * 10**6)),
        )
        for name, which, steps in kinds
        if steps <= max_steps
    ]
    return [*rows, ("painted", "", score(exam, exam.paint()))]


def table(rows: list[Row]) -> str:
    """Markdown: one row for each score."""
    head = "| clips | steps | frames | whole clips | motion | off its way, px | jitter, px |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for name, steps, found in rows:
        shares = (f"{100 * share:.1f}" for share in (found.frames, found.whole, found.motion))
        pixels = (f"{each:.1f}" for each in (found.way_px, found.jitter_px))
        lines.append("| " + " | ".join([name, steps, *shares, *pixels]) + " |")
    return "\n".join(lines) + "\n"
