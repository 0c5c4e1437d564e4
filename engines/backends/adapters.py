"""LoRAs beside a model: chosen by name and weight, added to its parts while it serves.

An engine learns no more than which weights differ from the built ones (`Engine.refit`); what a file
holds and what is added, `engines.loras` knows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from engines.backends.engine import Engine
from engines.errors import InvalidInput
from engines.loras.file import PREFIXES, Lora, LowRank
from engines.loras.fusing import check_fit, fused

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AdapterSet = tuple[tuple[str, float], ...]  # (name, λ) in the names' order, no λ of 0; (): the base


class Adapters:
    """The LoRAs a model may be asked for, and which of them its engines hold now."""

    def __init__(
        self,
        loras: Mapping[str, Lora],
        engines: Mapping[str, Engine],
        files: Mapping[str, Path] = MappingProxyType({}),
        base: str = "this model",
    ) -> None:
        """``files``, where the LoRAs are, and ``base``, the model's name, are for messages.

        Raises:
            CheckpointError: a LoRA was made for another architecture.
        """
        self._loras = loras
        self._engines = engines
        self._current: AdapterSet | None = ()  # None: a switch failed half way
        self._held: dict[str, AdapterSet | None] = dict.fromkeys(PREFIXES, ())  # of it, by part
        self._moved: dict[tuple[str, str], LowRank] = {}  # by name and weight: where engines are
        for name, lora in loras.items():
            what = f"{name!r} ({files[name]})" if name in files else repr(name)
            check_fit(what, lora, lambda part, weight: engines[part].weight(weight), base)

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
        """The weights that the set changes."""
        engine, outcome = self._engines[part], {}
        for weight in sorted({w for name, _ in wanted for w in self._loras[name][part]}):
            built = engine.weight(weight)
            found = [(s, self._pair(name, part, weight, built.device)) for name, s in wanted]
            outcome[weight] = fused(built, [(s, pair) for s, pair in found if pair])
        return outcome

    def _pair(self, name: str, part: str, weight: str, device: torch.device) -> LowRank | None:
        """On the device of the weight that it changes, and from its first use on kept there."""
        pair = self._loras[name][part].get(weight)
        if pair is None or pair.down.device == device:
            return pair
        if (name, weight) not in self._moved:
            self._moved[name, weight] = pair.to(device)
        return self._moved[name, weight]
