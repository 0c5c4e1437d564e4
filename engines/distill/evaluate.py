"""Scores models: draws prompts by diffusers' own pipelines, lets the checker read the pictures.

Owns what is asked and how answers are counted. Trains nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, LCMScheduler
from tqdm import tqdm

from engines.distill.captions import caption
from engines.distill.checker import Reading, read
from engines.distill.consistency import NUM_SOLVER_STEPS
from engines.distill.critic import Critic, features_of, frechet_distance
from engines.distill.painter import Pixels, paint
from engines.distill.training import TrainingError
from engines.distill.world import ATTRIBUTES, LOOKS, Scene, draw_scene

BATCH_SIZE = 32
GUIDANCE = 3.0  # diffusers' guidance_scale (w + 1) of the table's rows, unless a row says otherwise
STYLE_GUIDANCE = 2.0  # of styles: guidance makes a look stronger too, at 3 objects suffer from it
LCM_SPACING = {"original_inference_steps": NUM_SOLVER_STEPS}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model, its LoRAs with their weights λ, and how it draws."""

    model: str
    num_steps: int
    guidance_scale: float = GUIDANCE
    loras: tuple[tuple[str, float], ...] = ()
    vae: str | None = None  # in place of the model's own

    @property
    def name(self) -> str:
        vae = [self.vae] if self.vae else []
        loras = [f"{weight:g}·{lora}" for lora, weight in self.loras]
        return " + ".join([self.model, *vae, *loras])

    @property
    def folders(self) -> list[str]:
        """All that it is made of."""
        return [self.model, *([self.vae] if self.vae else []), *(name for name, _ in self.loras)]


@dataclasses.dataclass(frozen=True)
class Score:
    """Shares of pictures in 0..1, and the distance of their features to painted pictures'."""

    contestant: Contestant
    by_attribute: dict[str, float]  # over all prompts
    seen: float  # mean over attributes, prompts of the training side
    held_out: float  # likewise, combinations never seen
    everything: float  # pictures with every attribute right
    styled: dict[str, float]  # share of pictures read as each style
    sharpness: float  # mean absolute difference between neighbouring pixels, 0..255
    frechet: float


@dataclasses.dataclass(frozen=True)
class Exam:
    """The same questions for every contestant."""

    scenes: tuple[Scene, ...]
    held_out: tuple[bool, ...]
    seed: int

    @classmethod
    def of(cls, num_prompts: int, seed: int = 1) -> Exam:
        """Half the prompts from each side of the split."""
        rng = np.random.default_rng((seed, num_prompts))
        sides = tuple(index % 2 == 1 for index in range(num_prompts))
        return cls(tuple(draw_scene(rng, held_out=side) for side in sides), sides, seed)


def load(models: Path, contestant: Contestant, device: torch.device) -> Any:
    """The contestant's pipeline in float32, as any user of diffusers would load it."""
    for folder in contestant.folders:
        if not (models / folder).is_dir():
            raise TrainingError(f"--models {models} has no {folder}; train or copy it there")
    options: dict[str, Any] = {"torch_dtype": torch.float32}
    if contestant.vae:
        options["vae"] = AutoencoderTiny.from_pretrained(models / contestant.vae, **options)
    pipeline = DiffusionPipeline.from_pretrained(models / contestant.model, **options)
    names = [name for name, _ in contestant.loras]
    for name in names:
        pipeline.load_lora_weights(models / name, adapter_name=name)
    if names:
        pipeline.set_adapters(names, [weight for _, weight in contestant.loras])
    if any("lcm" in name for name in names):
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, **LCM_SPACING)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def draw(pipeline: Any, contestant: Contestant, prompts: list[str], seed: int) -> Pixels:
    """uint8 [N, H, W, 3]; picture i comes from the generator seeded ``seed + i``."""
    pictures = []
    for begin in tqdm(range(0, len(prompts), BATCH_SIZE), desc=contestant.name, unit="batch"):
        part = prompts[begin : begin + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(seed + begin + i) for i in range(len(part))]
        drawn = pipeline(
            part,
            num_inference_steps=contestant.num_steps,
            guidance_scale=contestant.guidance_scale,
            generator=generators,
            output_type="np",
        ).images
        pictures.append(np.rint(np.asarray(drawn) * 255).astype(np.uint8))
    return np.concatenate(pictures)


def score(contestant: Contestant, exam: Exam, pictures: Pixels, critic: Critic) -> Score:
    """Count the right answers in the exam's pictures."""
    readings = [read(picture) for picture in pictures]
    right = np.array(
        [[reading.agrees(scene, name) for name in ATTRIBUTES]
         for reading, scene in zip(readings, exam.scenes, strict=True)]
    )  # [N, attributes]  # fmt: skip
    held_out = np.array(exam.held_out)
    truth = np.stack([paint(scene) for scene in exam.scenes])
    return Score(
        contestant=contestant,
        by_attribute=dict(zip(ATTRIBUTES, right.mean(axis=0).tolist(), strict=True)),
        seen=float(right[~held_out].mean()),
        held_out=float(right[held_out].mean()),
        everything=float(right.all(axis=1).mean()),
        styled=_shares(readings),
        sharpness=float(np.abs(np.diff(pictures.astype(np.float32), axis=2)).mean()),
        frechet=frechet_distance(features_of(critic, pictures), features_of(critic, truth)),
    )


def _shares(readings: list[Reading]) -> dict[str, float]:
    styles = [reading.style for reading in readings]
    return {style: styles.count(style) / len(styles) for style in sorted(set(styles))}


def examine(
    models: Path, contestants: list[Contestant], exam: Exam, critic: Critic, device: torch.device
) -> list[Score]:
    """Every contestant's score, in order."""
    prompts = [caption(scene) for scene in exam.scenes]
    scores = []
    for contestant in contestants:
        pipeline = load(models, contestant, device)
        pictures = draw(pipeline, contestant, prompts, exam.seed * 1_000_000)
        scores.append(score(contestant, exam, pictures, critic))
    return scores


def contestants_of(models: Path) -> list[Contestant]:
    """The table's rows, for those models that the folder has."""
    lora = (("demo-lcm-lora", 1.0),)
    rows = [Contestant("demo-base", steps) for steps in (50, 25)]
    rows += [Contestant("demo-lcm", steps) for steps in (1, 2, 4, 8)]
    rows += [Contestant("demo-lcm", 4, guidance) for guidance in (1.0, 2.0, 6.0)]
    rows += [Contestant("demo-lcm", steps, vae="demo-tiny-vae") for steps in (1, 4)]
    rows += [Contestant("demo-base", steps, 1.0, lora) for steps in (1, 2, 4, 8)]
    without = (("demo-lcm-lora", 0.0),)  # the same sampler and guidance, to see what the LoRA adds
    rows += [Contestant("demo-base", steps, 1.0, without) for steps in (1, 4)]
    rows.append(Contestant("demo-base", 50, STYLE_GUIDANCE))
    for style in (f"demo-{look}-lora" for look in LOOKS):
        rows.append(Contestant("demo-base", 50, STYLE_GUIDANCE, ((style, 1.0),)))
        rows.append(Contestant("demo-base", 4, 1.0, (*lora, (style, 1.0))))
    return [row for row in rows if all((models / name).is_dir() for name in row.folders)]


def table(scores: list[Score]) -> str:
    """Markdown: one row for each score."""
    head = "| model | steps | guidance | seen | held-out | all right | "
    head += " | ".join(ATTRIBUTES) + " | look | sharpness | Fréchet |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for s in scores:
        look = max(s.styled, key=lambda name: s.styled[name])
        cells = [
            s.contestant.name,
            str(s.contestant.num_steps),
            f"{s.contestant.guidance_scale:g}",
            *(f"{100 * share:.1f}" for share in (s.seen, s.held_out, s.everything)),
            *(f"{100 * s.by_attribute[name]:.0f}" for name in ATTRIBUTES),
            f"{look} {100 * s.styled[look]:.0f}",
            f"{s.sharpness:.2f}",
            f"{s.frechet:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
