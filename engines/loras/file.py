"""LoRA files: from any layout that people have to low-rank pairs by the model's own names.

Names are brought together by diffusers' own conversions. Whatever else a file says of its layers,
an α or a magnitude, is used where it stands or refused by its key: nothing is dropped on the way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from engines.errors import CheckpointError, reason_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PREFIXES = {  # part → prefixes of its weights, of which a model may lack some
    "denoiser": ("unet", "transformer"),
    "text_encoder": ("text_encoder", "text_encoder_2"),
}
# What diffusers' conversion of the original's block names reads of a UNet's configuration.
SGM_BLOCKS = SimpleNamespace(layers_per_block=2)
USUAL_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
ADAPTER_CONFIG = "adapter_config.json"  # peft's, beside a file that it saved itself
UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")  # of files for a UNet and nothing else
PEFT_PREFIX = "base_model.model."
PEFT_CLASSES = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "PixArtTransformer2DModel": "transformer",
}
# Of peft's `init_lora_weights`: those by which it also takes something from the model's weights.
TAKEN_FROM_MODEL = ("pissa", "olora", "corda", "lora_ga", "loftq")
MOTION_KEY = ".motion_modules."  # in the names of what AnimateDiff adds to a UNet
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # peft's names, which all layouts are brought to
# How a tensor of a plain pair ends in any layout, and how its other half does.
DOWNS = {"lora_A.weight": "lora_B.weight", "down.weight": "up.weight"}
HALVES = DOWNS | {up: down for down, up in DOWNS.items()}


@dataclass(frozen=True, slots=True)
class LowRank:
    """What a LoRA adds to one weight at λ = 1: ``scale`` · ``up`` · ``down``."""

    down: Tensor  # [r, in, ...]
    up: Tensor  # [out, r, ...]
    scale: float  # α / r, or α / √r

    def to(self, device: torch.device) -> LowRank:
        return LowRank(self.down.to(device), self.up.to(device), self.scale)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """float32, in the weight's own shape; a convolution's `up` is 1 x 1."""
        product: Tensor = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(shape)


Lora = Mapping[str, Mapping[str, LowRank]]  # part → weight's name → pair


def read_lora(path: Path) -> Lora:
    """A LoRA's pairs, from a file or folder in any layout diffusers reads (peft, kohya, its own).

    An adapter that peft itself saved is read with its configuration, which lies beside the file.

    Raises:
        CheckpointError: it is not there, is no safetensors file, or is more than a plain LoRA.
    """
    from diffusers import StableDiffusionPipeline

    try:
        file = _file_of(path)
        raw, metadata = _load(file)
        _check_pairs(path, raw)
        if any(key.startswith(PEFT_PREFIX) for key in raw):
            raw, metadata = _named_as_by_diffusers(path, raw, file.with_name(ADAPTER_CONFIG))
        matrices = {
            f"unet.{key}" if key.startswith(UNET_BLOCKS) else key: matrix
            for key, matrix in _with_alphas(path, raw).items()
        }
        state = StableDiffusionPipeline.lora_state_dict(dict(matrices), unet_config=SGM_BLOCKS)[0]
        prefixes = [prefix for each in PREFIXES.values() for prefix in each]
        layers = {prefix: _layers(prefix, state) for prefix in prefixes}
    except CheckpointError:
        raise
    except Exception as error:  # diffusers and safetensors raise many kinds; all mean the same here
        raise CheckpointError(
            f"LoRA {path} cannot be read by diffusers: {reason_of(error)}"
        ) from error
    _check_all_used(path, matrices, layers)
    return {
        part: {
            name: pair
            for prefix in own
            for name, pair in _pairs(path, prefix, layers[prefix], metadata).items()
        }
        for part, own in PREFIXES.items()
    }


def _file_of(path: Path) -> Path:
    """The file itself, or the one that a folder has."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"LoRA {path} is neither a file nor a folder")
    usual = [path / name for name in USUAL_FILES if (path / name).is_file()]
    found = usual or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(
            f"LoRA {path} should hold one safetensors file, found {listed}: name the file itself"
        )
    return found[0]


def _load(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors, and what diffusers wrote of peft's configuration into the header."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        raw = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        header = opened.metadata() or {}
    return raw, json.loads(header.get("lora_adapter_metadata", "{}"))


def _named_as_by_diffusers(
    path: Path, raw: Mapping[str, Tensor], config_file: Path
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors and configuration of what peft saved itself, as diffusers would have them."""
    if not config_file.is_file():
        raise CheckpointError(
            f"LoRA {path} holds {next(iter(raw))}, which is how peft saves it, but no "
            f"{config_file.name} with its alpha is beside it; put it there"
        )
    config = json.loads(config_file.read_text())
    made_for = (config.get("auto_mapping") or {}).get("base_model_class", "UNet2DConditionModel")
    if made_for not in PEFT_CLASSES:
        raise CheckpointError(
            f"LoRA {path} was made for a {made_for}; known are {', '.join(PEFT_CLASSES)}"
        )
    prefix = PEFT_CLASSES[made_for]
    named = {f"{prefix}.{key.removeprefix(PEFT_PREFIX)}": tensor for key, tensor in raw.items()}
    return named, {f"{prefix}.{key}": value for key, value in config.items()}


def _check_pairs(path: Path, raw: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for the first tensor that is no half of a plain pair, and no α."""
    for key, tensor in raw.items():
        if key.endswith(".alpha"):
            continue
        end = next((end for end in HALVES if key.endswith(end)), None)
        if end is None and MOTION_KEY in key:
            raise CheckpointError(
                f"LoRA {path} holds {key}: it is a motion adapter, not a LoRA, give it by "
                "--motion-adapter"
            )
        if end is None:
            raise CheckpointError(
                f"LoRA {path} holds {key}: only plain pairs of matrices can be fused (no DoRA, "
                "LoHa, LoKr, LoCon in Tucker form or biases); merge it into the checkpoint with "
                "its own tool"
            )
        other = key.removesuffix(end) + HALVES[end]
        if other not in raw:
            raise CheckpointError(f"LoRA {path} holds {key}, but no {other} that goes with it")
        up, down = (raw[other], tensor) if end in DOWNS else (tensor, raw[other])
        if min(up.ndim, down.ndim) < 2 or math.prod(up.shape[1:]) != down.shape[0]:
            raise CheckpointError(
                f"LoRA {path} holds {key} as {tuple(tensor.shape)} and {other} as "
                f"{tuple(raw[other].shape)}: they have no rank in common"
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


def _layers(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's own entries under peft's names, `<layer>.lora_A.weight` and `.lora_B.weight`."""
    from diffusers.utils import state_dict_utils as names

    layers = {k[len(prefix) + 1 :]: v for k, v in state.items() if k.startswith(f"{prefix}.")}
    if prefix in PREFIXES["denoiser"]:
        return dict(names.convert_unet_state_dict_to_peft(layers))
    # At once, where diffusers guesses at one of the two, or at neither, from the layers there are.
    both = names.DIFFUSERS_TO_PEFT | names.DIFFUSERS_OLD_TO_PEFT
    layers = names.convert_state_dict(layers, both)
    # transformers' encoder with a projection still has a level that the one without has lost.
    level = "text_model." if prefix == "text_encoder_2" else ""
    return {level + key.removeprefix("text_model."): value for key, value in layers.items()}


def _check_all_used(
    path: Path, matrices: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Raise CheckpointError where a tensor of the file is in no pair after all conversions."""
    used = {
        id(half)
        for part in layers.values()
        for name, half in part.items()
        if name.endswith((DOWN, UP))
    }
    lost = [key for key, matrix in matrices.items() if id(matrix) not in used]
    if lost or not matrices:
        found = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "") or "nothing at all"
        raise CheckpointError(
            f"LoRA {path} holds {found}, which is no layer of such a model ({len(lost)} of its "
            f"{len(matrices)} matrices)"
        )


def _pairs(
    path: Path, prefix: str, layers: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> dict[str, LowRank]:
    """A network's pairs by the names of the weights that they change."""
    names = sorted(key.removesuffix(DOWN) for key in layers if key.endswith(DOWN))
    ranks = {name: layers[name + DOWN].shape[0] for name in names}
    scales = _scales(path, prefix, metadata, ranks)
    return {
        f"{prefix}.{name}.weight": LowRank(layers[name + DOWN], layers[name + UP], scales[name])
        for name in names
    }


def _scales(
    path: Path, prefix: str, metadata: Mapping[str, Any], ranks: Mapping[str, int]
) -> dict[str, float]:
    """α / r by layer, as peft's configuration has them; peft decides which pattern fits.

    With `use_rslora` α / √r (arXiv 2312.03732). 1 where there is no configuration: α is r then.
    """
    from peft.utils.other import get_pattern_key

    own = {k[len(prefix) + 1 :]: v for k, v in metadata.items() if k.startswith(f"{prefix}.")}
    if own.get("use_dora"):
        raise CheckpointError(
            f"LoRA {path} was made with use_dora, which is not fused here; merge it into the "
            "checkpoint with its own tool"
        )
    began = str(own.get("init_lora_weights", True))
    if began.lower().startswith(TAKEN_FROM_MODEL):
        raise CheckpointError(
            f"LoRA {path} was made with init_lora_weights={began!r}, for a model whose own weights "
            "were changed as well; save it for the plain one, by peft's save_pretrained with "
            "path_initial_model_for_weight_conversion"
        )
    patterns: Mapping[str, float] = own.get("alpha_pattern") or {}
    scales, used = {}, set()
    for name, rank in ranks.items():
        # transformers had a level more in its text encoders when patterns were written for them.
        keys = [get_pattern_key(list(patterns), each) for each in (name, f"text_model.{name}")]
        key = next((each for each in keys if each in patterns), None)
        alpha = own.get("lora_alpha", rank) if key is None else patterns[key]
        scales[name] = float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)
        used.add(key)
    if unused := patterns.keys() - used:
        raise CheckpointError(
            f"LoRA {path} gives an alpha to {sorted(unused)[0]!r}, which fits none of its layers"
        )
    return scales
