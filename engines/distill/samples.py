"""Training data: painted scenes with their captions as tokens, made once and kept on disk.

Owns sizes, counts and the cache. Every sample is from the training side of the split.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engines.distill.captions import caption, paraphrase
from engines.distill.painter import paint
from engines.distill.training import Place
from engines.distill.world import draw_scene

CAPTIONS_PER_SAMPLE = 4
# Width x height in pixels, and how many scenes of each: most at the native size, the others so
# that the model has seen wide, tall, small and large pictures.
SIZES: dict[tuple[int, int], int] = {
    (128, 128): 24_000,
    (96, 128): 1_500,
    (128, 96): 1_500,
    (192, 128): 1_500,
    (128, 192): 1_500,
    (96, 96): 1_000,
    (160, 160): 1_500,
    (192, 192): 1_500,
}


@dataclasses.dataclass(frozen=True)
class Samples:
    """Scenes of one size: ``images`` uint8 [N, H, W, 3]; ``token_ids`` int64 [N, C, L]."""

    images: np.ndarray[Any, np.dtype[np.uint8]]
    token_ids: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.images)


def make_samples(
    place: Place, tokenizer: Any, size_px: tuple[int, int], num_samples: int, style: str = "plain"
) -> Samples:
    """Paint the run's share of ``num_samples`` scenes and caption them, or read them from disk."""
    folder, seed, num_samples = place.folder, place.seed, place.count(num_samples)
    width, height = size_px
    file = folder / f"samples-{style}-{width}x{height}-{num_samples}-{seed}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((seed, width, height, len(style)))
        progress = tqdm(range(num_samples), desc=f"paint {style} {width}x{height}", unit="img")
        scenes = [draw_scene(rng, style=style) for _ in progress]
        images = np.stack([paint(scene, width, height) for scene in tqdm(scenes, disable=True)])
        texts = [
            [caption(scene), *(paraphrase(scene, rng) for _ in range(CAPTIONS_PER_SAMPLE - 1))]
            for scene in scenes
        ]
        ids = np.stack([tokenize(tokenizer, options).numpy() for options in texts])
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, images=images, token_ids=ids)
        partial.replace(file)
    with np.load(file) as data:
        return Samples(data["images"], data["token_ids"])


def tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """Token ids, padded and cut to the window: int64 [N, L]."""
    ids = tokenizer(
        texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length
    )["input_ids"]
    return torch.tensor(ids)


def to_pixels(images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
