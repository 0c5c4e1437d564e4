"""LoRAs beside a model: chosen by name and weight, fused into its parts.

Owns the sum of low-rank pairs with the built weights. An engine learns no more than which weights
differ from the built ones (`Engine.refit`); files are read by `lora_file`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.engine import Engine
from engines.backends.lora_file import PREFIXES, Lora, LowRank, read_lora
from engines.errors import CheckpointError, InvalidInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from engines.families.part import Part

AdapterSet = tuple[tuple[str, float], ...]  # (name, λ) in the names' order, no λ of 0; (): the base


class Adapters:
    """The LoRAs a model may be asked for, and which of them its engines hold now."""

    def __init__(self, loras: Mapping[str, Lora], engines: Mapping[str, Engine]) -> None:
        """Raises CheckpointError where a LoRA was made for another architecture."""
        self._loras = loras
        self._engines = engines
        self._current: AdapterSet | None = ()  # None: a switch failed half way
        self._held: dict[str, AdapterSet | None] = dict.fromkeys(PREFIXES, ())  # of it, by part
        self._moved: dict[tuple[str, str], LowRank] = {}  # by name and weight: where engines are
        for name, lora in loras.items():
            _check_fit(name, lora, engines)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loras)

    def settle(self, wanted: Mapping[str, float]) -> AdapterSet:
        """The set in its one canonical form.

        Raises:
            InvalidInput: a name that is not among the allowed ones, or a weight that is no number.
        """
        for name, weight in wanted.items():
            if name not in self._loras:
                known = ", ".join(self._loras) or "none"
                raise InvalidInput(
                    "loras", name, f"loras names {name!r}; served with this model: {known}"
                )
            if not math.isfinite(weight):
                raise InvalidInput(
                    "loras", weight, f"loras gives {name!r} the weight {weight}; use a number"
                )
        return tuple((name, float(wanted[name])) for name in sorted(wanted) if wanted[name])

    def hold(self, wanted: AdapterSet) -> bool:
        """Whether the engines draw with this set now."""
        return wanted == self._current

    def switch(self, wanted: AdapterSet) -> None:
        """Make the engines draw with ``wanted``; nothing of the set before stays."""
        if self.hold(wanted):
            return
        self._current = None
        for part in PREFIXES:
            own = tuple((name, weight) for name, weight in wanted if self._loras[name][part])
            if own != self._held[part]:
                self._held[part] = None
                self._engines[part].refit(own, functools.partial(self._fuse, part, own))
                self._held[part] = own
        self._current = wanted

    def _fuse(self, part: str, wanted: AdapterSet) -> dict[str, Tensor]:
        """W + Σ λ · scale · up · down in float32, in the built weight's own type."""
        engine, fused = self._engines[part], {}
        for weight in sorted({w for name, _ in wanted for w in self._loras[name][part]}):
            built = engine.weight(weight)
            total = built.float()
            for name, strength in wanted:
                pair = self._pair(name, part, weight, built.device)
                if pair is not None:
                    total = total + strength * pair.delta(tuple(built.shape))
            fused[weight] = total.to(built.dtype)
        return fused

    def _pair(self, name: str, part: str, weight: str, device: torch.device) -> LowRank | None:
        """On the device of the weight that it changes, and from its first use on kept there."""
        pair = self._loras[name][part].get(weight)
        if pair is None or pair.down.device == device:
            return pair
        if (name, weight) not in self._moved:
            self._moved[name, weight] = pair.to(device)
        return self._moved[name, weight]


def fuse(parts: Sequence[Part], loras: Sequence[tuple[Path, float]]) -> None:
    """Add LoRAs, each with its λ, to the weights of a model's modules, for good.

    Raises:
        CheckpointError: a file is no LoRA, or was made for another architecture.
    """
    from engines.backends.torch_engine import TorchEngine

    if loras:
        named = {f"{index}: {path}": (path, weight) for index, (path, weight) in enumerate(loras)}
        engines: dict[str, Engine] = {part.name: TorchEngine(part, "cpu") for part in parts}
        adapters = Adapters({name: read_lora(path) for name, (path, _) in named.items()}, engines)
        adapters.switch(adapters.settle({name: weight for name, (_, weight) in named.items()}))


def _check_fit(name: str, lora: Lora, engines: Mapping[str, Engine]) -> None:
    strange = []
    for part, pairs in lora.items():
        for weight, pair in pairs.items():
            try:
                shape = tuple(engines[part].weight(weight).shape)
            except KeyError:
                strange.append(weight)
                continue
            changed = (pair.up.shape[0], *pair.down.shape[1:])
            if math.prod(changed) != math.prod(shape):  # a 1 x 1 convolution's may be a matrix
                raise CheckpointError(
                    f"LoRA {name!r} changes {weight} as {changed}, here it is {shape}: it was made "
                    "for another model"
                )
    if strange:
        count = sum(len(pairs) for pairs in lora.values())
        listed = ", ".join(strange[:3]) + (", …" if len(strange) > 3 else "")
        raise CheckpointError(
            f"LoRA {name!r} changes {listed}, which this model has not ({len(strange)} of its "
            f"{count} weights): it was made for another"
        )
