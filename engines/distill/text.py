"""Stage 2: the text encoder. Learns to read, before any picture, what a caption says.

CLIP learns from pictures and words together; this world is small enough to say outright what a
caption means. Later stages leave it alone, as Stable Diffusion leaves CLIP.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.distill.captions import paraphrase
from engines.distill.networks import TEXT_WIDTH, build_text_encoder
from engines.distill.samples import tokenize
from engines.distill.training import Course, Draws, Place, train
from engines.distill.world import (
    BACKGROUND_COLORS,
    COLUMNS,
    LINES,
    OBJECT_COLORS,
    ROWS,
    SHAPES,
    SIZES,
    STYLES,
    TIMES,
    Scene,
    draw_scene,
)

COURSE = Course(num_steps=1_000, batch_size=128, learning_rate=2e-3, average=0.99)
MEANINGS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(OBJECT_COLORS),
    "size": tuple(SIZES),
    "column": tuple(COLUMNS),
    "row": tuple(ROWS),
    "background": tuple(BACKGROUND_COLORS),
    "time": TIMES,
    "line": LINES,
    "style": STYLES,
}


def train_text_encoder(course: Course, place: Place, tokenizer: Any) -> Any:
    """Train and return the CLIPTextModel: linear heads on its end token name every attribute.

    An attribute that a caption leaves unsaid teaches its even odds. The heads are thrown away.
    """
    torch.manual_seed(place.seed)
    encoder = build_text_encoder(tokenizer).to(place.device)
    heads = nn.ModuleDict({k: nn.Linear(TEXT_WIDTH, len(v)) for k, v in MEANINGS.items()})
    heads = heads.to(place.device)

    def loss_of(draws: Draws) -> Tensor:
        scenes = [_any_style(draws.numpy) for _ in range(course.batch_size)]
        ids = tokenize(tokenizer, [paraphrase(scene, draws.numpy) for scene in scenes])
        pooled = encoder(ids.to(place.device)).pooler_output  # [B, 96]
        losses = [
            F.cross_entropy(heads[name](pooled), labels.to(place.device))
            for name, labels in labels_of(scenes).items()
        ]
        return torch.stack(losses).mean()

    train("text", course, place, [*encoder.parameters(), *heads.parameters()], loss_of)
    return encoder


def _any_style(rng: np.random.Generator) -> Scene:
    style = STYLES[int(rng.integers(len(STYLES)))] if rng.random() < 0.3 else "plain"
    return draw_scene(rng, style=style)


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """Each attribute's word as its index in MEANINGS: int64 [N]."""
    return {
        name: torch.tensor([words.index(getattr(scene, name)) for scene in scenes])
        for name, words in MEANINGS.items()
    }
