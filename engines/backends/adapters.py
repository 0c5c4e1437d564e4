"""LoRAs beside a model: read from files, chosen by name and weight, fused into its parts.

Owns the low-rank pairs and their sum with the built weights. An engine learns no more than which
weights differ from the built ones (`Engine.refit`); reading a file is diffusers' own work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.backends.engine import Engine
from engines.errors import CheckpointError, InvalidInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from engines.families.part import Part

AdapterSet = tuple[tuple[str, float], ...]  # (name, λ) in the names' order, no λ of 0; (): the base
PREFIXES = {"denoiser": "unet", "text_encoder": "text_encoder"}  # part → prefix of its weights


@dataclass(frozen=True, slots=True)
class LowRank:
    """What a LoRA adds to one weight at λ = 1: ``scale`` · ``up`` · ``down``."""

    down: Tensor  # [r, in, ...]
    up: Tensor  # [out, r, ...]
    scale: float  # α / r

    def to(self, device: torch.device) -> LowRank:
        return LowRank(self.down.to(device), self.up.to(device), self.scale)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """float32, in the weight's own shape; a convolution's `up` is 1 x 1."""
        product: Tensor = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(shape)


Lora = Mapping[str, Mapping[str, LowRank]]  # part → weight's name → pair


def read_lora(path: Path) -> Lora:
    """A LoRA's pairs, from a file or folder in any layout diffusers reads (peft, kohya, its own).

    Raises:
        CheckpointError: it is not there, is no safetensors file, or is more than a plain LoRA.
    """
    from diffusers import StableDiffusionPipeline

    if not path.exists():
        raise CheckpointError(f"LoRA {path} is neither a file nor a folder")
    try:
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            str(path), use_safetensors=True, local_files_only=True, return_lora_metadata=True
        )
        layers = {part: _layers(part, prefix, state) for part, prefix in PREFIXES.items()}
    except Exception as error:  # diffusers and safetensors raise many kinds; all mean the same here
        reason = str(error).splitlines()[0][:300]
        raise CheckpointError(f"LoRA {path} cannot be read by diffusers: {reason}") from error
    lora: dict[str, Mapping[str, LowRank]] = {}
    for part, prefix in PREFIXES.items():
        scales = _scales(prefix, alphas or {}, metadata or {})
        lora[part] = _pairs(path, prefix, layers[part], scales)
    known = tuple(f"{prefix}." for prefix in PREFIXES.values())
    strange = [key for key in state if not key.startswith(known)]
    if strange or not any(lora.values()):
        found = strange[0] if strange else "nothing at all"
        raise CheckpointError(f"LoRA {path} holds {found}, which is no layer of such a model")
    return lora


def _layers(part: str, prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's own entries under peft's names, `<layer>.lora_A.weight` and `.lora_B.weight`."""
    from diffusers.utils import state_dict_utils as names

    layers = {k[len(prefix) + 1 :]: v for k, v in state.items() if k.startswith(f"{prefix}.")}
    if part == "denoiser":
        return dict(names.convert_unet_state_dict_to_peft(layers))
    if layers:
        layers = names.convert_state_dict_to_peft(names.convert_state_dict_to_diffusers(layers))
    return {key.removeprefix("text_model."): value for key, value in layers.items()}


def _scales(prefix: str, alphas: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """α by layer, and under "" the one for all others, where the file says."""
    own = {k[len(prefix) + 1 :]: v for k, v in metadata.items() if k.startswith(f"{prefix}.")}
    if own.get("use_rslora") or own.get("use_dora"):
        raise CheckpointError(
            "a LoRA with use_rslora or use_dora is not fused here; merge it first"
        )
    scales = dict(own.get("alpha_pattern") or {})
    if "lora_alpha" in own:
        scales[""] = own["lora_alpha"]
    for key, value in alphas.items():
        if key.startswith(f"{prefix}."):
            scales[key[len(prefix) + 1 :].split(".lora")[0].removesuffix(".alpha")] = float(value)
    return scales


def _pairs(
    path: Path, prefix: str, layers: Mapping[str, Tensor], scales: Mapping[str, Any]
) -> dict[str, LowRank]:
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {key.removesuffix(end) for key in layers for end in ends if key.endswith(end)}
    odd = [key for key in layers if not key.endswith(ends)]
    odd += [name for name in names if not all(f"{name}{end}" in layers for end in ends)]
    if odd:
        raise CheckpointError(
            f"LoRA {path} holds {prefix}.{odd[0]}: only plain pairs of matrices can be fused "
            "(no DoRA, LoHa or biases); merge it into the checkpoint with its own tool"
        )
    pairs = {}
    for name in sorted(names):
        down, up = (layers[f"{name}{end}"] for end in ends)
        rank = down.shape[0]
        alpha = scales.get(name, scales.get("", rank))
        pairs[f"{prefix}.{name}.weight"] = LowRank(down, up, float(alpha) / rank)
    return pairs


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
            for part, pairs in lora.items():
                for weight, pair in pairs.items():
                    _check_fit(name, weight, pair, engines[part])

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


def _check_fit(name: str, weight: str, pair: LowRank, engine: Engine) -> None:
    try:
        shape = tuple(engine.weight(weight).shape)
    except KeyError as error:
        raise CheckpointError(
            f"LoRA {name!r} changes {weight}, which this model has not: it was made for another"
        ) from error
    changed = (pair.up.shape[0], *pair.down.shape[1:])
    if math.prod(changed) != math.prod(shape):  # a 1 x 1 convolution's may be a matrix
        raise CheckpointError(
            f"LoRA {name!r} changes {weight} as {changed}, here it is {shape}: it was made for "
            "another model"
        )
