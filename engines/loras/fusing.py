"""The sum of low-rank pairs with built weights: whether they fit, and for good."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import CheckpointError
from engines.loras.file import Lora, LowRank, read_lora

if TYPE_CHECKING:
    from torch import Tensor

    from engines.families.part import Part

WeightOf = Callable[[str, str], "Tensor"]  # part, weight's name → as it was built, or KeyError


def fused(built: Tensor, pairs: Iterable[tuple[float, LowRank]]) -> Tensor:
    """W + Σ λ · scale · up · down in float32, in the built weight's own type."""
    total = built.float()
    for strength, pair in pairs:
        total = total + strength * pair.delta(tuple(built.shape))
    return total.to(built.dtype)


def without(lora: Lora, idle: tuple[str, ...]) -> Lora:
    """A LoRA but for what it adds to weights whose names begin so: a compiled part has none."""
    return {
        part: {name: pair for name, pair in pairs.items() if not name.startswith(idle)}
        for part, pairs in lora.items()
    }


def fuse(
    parts: Sequence[Part], loras: Sequence[tuple[Path, float]], base: str = "this model"
) -> None:
    """Add LoRAs, each with its λ, to the weights of a model's modules, for good.

    ``base`` is what messages call the model.

    Raises:
        CheckpointError: a file is no LoRA, or was made for another architecture.
    """
    weights = {part.name: dict(part.module.named_parameters()) for part in parts}
    pairs: dict[tuple[str, str], list[tuple[float, LowRank]]] = {}
    for path, strength in loras:
        lora = read_lora(path)
        check_fit(repr(str(path)), lora, lambda part, name: weights[part][name].detach(), base)
        for part, own in lora.items():
            for name, pair in own.items():
                pairs.setdefault((part, name), []).append((strength, pair))
    for (part, name), found in pairs.items():
        weight = weights[part][name].detach()  # the same memory
        weight.copy_(fused(weight, found))


def check_fit(name: str, lora: Lora, weight_of: WeightOf, base: str) -> None:
    """Raise CheckpointError where a LoRA was made for another architecture than ``base`` has."""
    strange = []
    for part, pairs in lora.items():
        for weight, pair in pairs.items():
            try:
                built = weight_of(part, weight)
            except KeyError:
                strange.append(weight)
                continue
            shape = tuple(built.shape)
            if not built.is_floating_point():
                raise CheckpointError(
                    f"LoRA {name} changes {weight}, which is in 8 bits in {base}: leave --t5-int8 "
                    "out to draw with it"
                )
            changed = (pair.up.shape[0], *pair.down.shape[1:])
            if math.prod(changed) != math.prod(shape):  # a 1 x 1 convolution's may be a matrix
                raise CheckpointError(
                    f"LoRA {name} changes {weight} as {changed}, in {base} it is {shape}: it was "
                    "made for another model"
                )
    if strange:
        count = sum(len(pairs) for pairs in lora.values())
        listed = ", ".join(strange[:3]) + (", …" if len(strange) > 3 else "")
        raise CheckpointError(
            f"LoRA {name} changes {listed}, which {base} has not ({len(strange)} of its {count} "
            "weights): it was made for another model"
        )
