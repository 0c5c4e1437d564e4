"""LoRA files: from any layout that people have to low-rank pairs by the model's own names.

Names are brought together by diffusers' own conversions. Whatever else a file says of its layers,
an α or a magnitude, is used where it stands or refused by name: nothing is dropped on the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PREFIXES = {"denoiser": "unet", "text_encoder": "text_encoder"}  # part → prefix of its weights
ENDS = (".lora_A.weight", ".lora_B.weight")  # peft's: down and up
# Of DoRA, LoHa, LoKr, (IA)³ and OFT: what diffusers would drop or could not name.
OTHER_KINDS = ("dora_scale", "lora_magnitude_vector", "hada_", "lokr_", "lora_mid", "ia3", "oft_")


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

    try:
        raw, metadata = _load(_file_of(path))
        _refuse_other_kinds(path, raw)
        state = StableDiffusionPipeline.lora_state_dict(_with_alphas(path, raw))[0]
        layers = {part: _layers(part, prefix, state) for part, prefix in PREFIXES.items()}
    except CheckpointError:
        raise
    except Exception as error:  # diffusers and safetensors raise many kinds; all mean the same here
        reason = str(error).splitlines()[0][:300]
        raise CheckpointError(f"LoRA {path} cannot be read by diffusers: {reason}") from error
    lora: dict[str, Mapping[str, LowRank]] = {}
    for part, prefix in PREFIXES.items():
        names = _names(path, prefix, layers[part])
        alphas = _alphas(path, prefix, metadata, names)
        lora[part] = {
            f"{prefix}.{name}.weight": _pair(layers[part], name, alphas.get(name)) for name in names
        }
    known = tuple(f"{prefix}." for prefix in PREFIXES.values())
    strange = [key for key in state if not key.startswith(known)]
    if strange or not any(lora.values()):
        found = strange[0] if strange else "nothing at all"
        raise CheckpointError(f"LoRA {path} holds {found}, which is no layer of such a model")
    return lora


def _file_of(path: Path) -> Path:
    """The file itself, or the one that a folder has."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"LoRA {path} is neither a file nor a folder")
    usual = path / "pytorch_lora_weights.safetensors"
    found = [usual] if usual.is_file() else sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(
            f"LoRA {path} should hold one safetensors file, found {listed}: name the file itself"
        )
    return found[0]


def _load(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors, and what peft wrote of its configuration into the header."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        raw = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        header = opened.metadata() or {}
    return raw, json.loads(header.get("lora_adapter_metadata", "{}"))


def _refuse_other_kinds(path: Path, raw: Mapping[str, Tensor]) -> None:
    for key in raw:
        if any(kind in key for kind in OTHER_KINDS):
            raise CheckpointError(
                f"LoRA {path} holds {key}: only plain pairs of matrices can be fused (no DoRA, "
                "LoHa, LoKr or biases); merge it into the checkpoint with its own tool"
            )


def _with_alphas(path: Path, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kohya's layers with their α / r in their own `up`, where no name can lose it.

    diffusers' conversion keeps an α under names that differ from layer to layer.
    """
    state = dict(raw)
    for key in [key for key in raw if key.endswith(".alpha")]:
        layer = key.removesuffix(".alpha")
        down, up = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
        if down not in raw or up not in raw:
            raise CheckpointError(f"LoRA {path} holds {key}, but no {down} and {up} that it is for")
        state[up] = raw[up].float() * (float(state.pop(key)) / raw[down].shape[0])
    return state


def _layers(part: str, prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's own entries under peft's names, `<layer>.lora_A.weight` and `.lora_B.weight`."""
    from diffusers.utils import state_dict_utils as names

    layers = {k[len(prefix) + 1 :]: v for k, v in state.items() if k.startswith(f"{prefix}.")}
    if part == "denoiser":
        return dict(names.convert_unet_state_dict_to_peft(layers))
    if layers:
        layers = names.convert_state_dict_to_peft(names.convert_state_dict_to_diffusers(layers))
    return {key.removeprefix("text_model."): value for key, value in layers.items()}


def _names(path: Path, prefix: str, layers: Mapping[str, Tensor]) -> list[str]:
    """Of the layers, each of which has both of its matrices."""
    names = {key.removesuffix(end) for key in layers for end in ENDS if key.endswith(end)}
    odd = [key for key in layers if not key.endswith(ENDS)]
    odd += [name for name in names if not all(f"{name}{end}" in layers for end in ENDS)]
    if odd:
        raise CheckpointError(
            f"LoRA {path} holds {prefix}.{odd[0]}: only plain pairs of matrices can be fused "
            "(no DoRA, LoHa or biases); merge it into the checkpoint with its own tool"
        )
    return sorted(names)


def _alphas(
    path: Path, prefix: str, metadata: Mapping[str, Any], names: list[str]
) -> dict[str, float]:
    """α by layer, as peft's configuration in the file's header has it; peft decides what fits."""
    from peft.utils.other import get_pattern_key

    own = {k[len(prefix) + 1 :]: v for k, v in metadata.items() if k.startswith(f"{prefix}.")}
    if own.get("use_rslora") or own.get("use_dora"):
        raise CheckpointError(
            f"LoRA {path} was made with use_rslora or use_dora, which is not fused here; merge it "
            "into the checkpoint with its own tool"
        )
    patterns: Mapping[str, float] = own.get("alpha_pattern") or {}
    alphas, used = {}, set()
    for name in names:
        # transformers had a level more in its text encoders when patterns were written for them.
        keys = [get_pattern_key(list(patterns), each) for each in (name, f"text_model.{name}")]
        key = next((each for each in keys if each in patterns), None)
        if key is not None:
            used.add(key)
            alphas[name] = float(patterns[key])
        elif "lora_alpha" in own:
            alphas[name] = float(own["lora_alpha"])
    if unused := patterns.keys() - used:
        raise CheckpointError(
            f"LoRA {path} gives an alpha to {sorted(unused)[0]!r}, which fits none of its layers"
        )
    return alphas


def _pair(layers: Mapping[str, Tensor], name: str, alpha: float | None) -> LowRank:
    down, up = (layers[f"{name}{end}"] for end in ENDS)
    rank = down.shape[0]
    return LowRank(down, up, 1.0 if alpha is None else alpha / rank)
