"""How far one build of a model is from another: every engine call made twice, on the same inputs.

The reference draws; each of its calls is handed to the other build too. So errors are those of one
part alone, never of the steps before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engines.backends.engine import Engine, Variant
from engines.drawing.model import Model, parts_of
from engines.drawing.runner import Runner
from engines.facts import EIGHT_BITS
from engines.families.recipe import Recipe

MIN_PSNR_DB = 35.0  # of the decoder's pixels
MAX_RELATIVE_ERROR = 0.02  # of every other output; half precision keeps 11 bits
MIN_IMAGE_PSNR_DB = 30.0  # of whole images in int8, of which single outputs are further off
MAX_RELATIVE_ERROR_INT8 = 0.2
NUM_STEPS = 4


@dataclass(slots=True)
class Parity:
    """One output of one part, over all calls."""

    part: str
    output: str
    num_values: int = 0
    num_not_finite: int = 0  # in the other build's output
    squared_error: float = 0.0
    squared_norm: float = 0.0  # of the reference
    largest_error: float = 0.0
    min_psnr_db: float = MIN_PSNR_DB
    max_relative_error: float = MAX_RELATIVE_ERROR

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Count one call's output."""
        truth, found = reference.double().cpu(), other.double().cpu()
        finite = torch.isfinite(found)
        error = torch.where(finite, found - truth, 0.0)
        self.num_values += found.numel()
        self.num_not_finite += int((~finite).sum())
        self.squared_error += float((error**2).sum())
        self.squared_norm += float((truth**2).sum())
        self.largest_error = max(self.largest_error, float(error.abs().max()))

    @property
    def relative_error(self) -> float:
        """‖other − reference‖ / ‖reference‖."""
        return float(np.sqrt(self.squared_error / max(self.squared_norm, 1e-30)))

    @property
    def psnr_db(self) -> float:
        """Of uint8 pixels."""
        if self.squared_error == 0:
            return float("inf")
        return float(10 * np.log10(255.0**2 * self.num_values / self.squared_error))

    @property
    def tells_finite(self) -> bool:
        """Whether nothing but that counts: sums of pixels may be near zero, and far off for it;
        an image is what the pixels show.
        """
        return self.output in ("pixel_sums", "image")

    @property
    def good(self) -> bool:
        """All finite, and within the limits of this module."""
        if self.num_not_finite:
            return False
        if self.tells_finite:
            return True
        if self.output == "pixels":
            return self.psnr_db >= self.min_psnr_db
        return self.relative_error <= self.max_relative_error


class _Both:
    """An engine that answers with the reference's outputs and counts the other's beside them."""

    def __init__(self, part: str, reference: Engine, other: Engine, *, in_8_bits: bool) -> None:
        self._part, self._reference, self._other = part, reference, other
        self._limits = (
            (MIN_IMAGE_PSNR_DB, MAX_RELATIVE_ERROR_INT8)
            if in_8_bits
            else (MIN_PSNR_DB, MAX_RELATIVE_ERROR)
        )
        self.outputs: dict[str, Parity] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        answer = {name: value.clone() for name, value in self._reference.run(inputs).items()}
        for name, found in self._other.run(inputs).items():
            parity = self.outputs.setdefault(name, self._parity(name))
            parity.add(answer[name], found)
        return answer

    def _parity(self, output: str) -> Parity:
        low, high = self._limits
        return Parity(self._part, output, min_psnr_db=low, max_relative_error=high)

    def weight(self, name: str) -> Tensor:
        return self._reference.weight(name)

    def refit(self, variant: Variant, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._reference.refit(variant, weights)
        self._other.refit(variant, weights)

    def close(self) -> None:
        self._reference.close()
        self._other.close()


def compare(
    reference: Model, other: Model, prompts: Sequence[str], in_8_bits: Collection[str] = ()
) -> list[Parity]:
    """Draw the prompts, from text and again by every decoder, from the picture where models take
    one, and compare every output met. ``in_8_bits`` are the parts with weights of 8 bits, where not
    all of the model is in such a precision.
    """
    parts = parts_of(reference.facts)
    whole = other.precision in EIGHT_BITS
    engines = {
        part: _Both(
            part, reference.engines[part], other.engines[part], in_8_bits=whole or part in in_8_bits
        )
        for part in parts
    }
    runner = Runner(dataclasses.replace(reference, engines=engines))
    recipes = [
        runner.default_recipe(seed, prompt, NUM_STEPS) for seed, prompt in enumerate(prompts)
    ]
    drawn = runner.draw(recipes)
    for decoder in runner.info.decoders:
        image = not runner.info.draws_clips
        runner.draw([_again(d.recipe, d.pixels if image else None, decoder) for d in drawn])
    return [parity for part in parts for parity in engines[part].outputs.values()]


def _again(recipe: Recipe, image: np.ndarray | None, decoder: str) -> Recipe:
    return dataclasses.replace(recipe, image=image, strength=0.5, decoder=decoder)


def image_psnrs_db(reference: Model, other: Model, prompts: Sequence[str]) -> list[float]:
    """Of whole images of the same prompts and seeds, each build drawing for itself."""
    drawn = []
    for model in (reference, other):
        runner = Runner(model)
        recipes = [
            runner.default_recipe(seed, text, NUM_STEPS) for seed, text in enumerate(prompts)
        ]
        drawn.append([drawing.pixels for drawing in runner.draw(recipes)])
    pairs = zip(*drawn, strict=True)
    return [psnr_db(a, b) for a, b in pairs if a is not None and b is not None]


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float(10 * np.log10(255.0**2 / error)) if error else float("inf")
