"""A T5 encoder whose layers are put into 8 bits as they are read: it is never in memory whole.

T5-XXL has 4.7 billion parameters. Read so, memory holds what has been put into 8 bits and one
matrix as the file has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engines.build.folder import variant_of, weights_in
from engines.build.int8_linear import Int8Linear, quantised
from engines.errors import CheckpointError, reason_of

WORDS = "shared.weight"  # the embeddings, of which a file may have the second name alone
SAME_WORDS = "encoder.embed_tokens.weight"


def load_t5_int8(folder: Path, dtype: torch.dtype) -> Any:
    """The `T5EncoderModel` of a component's folder: linear layers in 8 bits, all else in ``dtype``.

    What transformers keeps in float32 beside halves has scales of that type, and computes in it.

    Raises:
        CheckpointError: it is no T5 encoder, has no safetensors, or lacks a weight.
    """
    model = _empty(folder, dtype)
    weights = dict(model.named_parameters())
    missing = set(weights)
    for name, weight in _tensors(folder, missing | {SAME_WORDS}):
        own_name = WORDS if name == SAME_WORDS else name
        held = weights[own_name]
        if weight.shape != held.shape:
            raise CheckpointError(
                f"{folder} has {name} as {tuple(weight.shape)}, its config.json says "
                f"{tuple(held.shape)}"
            )
        missing.discard(own_name)
        if held.dtype == torch.int8:
            scale = f"{name.removesuffix('.weight')}.scale"
            missing.discard(scale)
            rounded, scales = quantised(weight, weights[scale].dtype)
            held.copy_(rounded)
            weights[scale].copy_(scales)
        else:
            held.copy_(weight)
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} weights, the first {min(missing)}")
    return model.eval()


def _empty(folder: Path, dtype: torch.dtype) -> Any:
    """The module with memory for all its weights and nothing in it.

    Were it taken matrix by matrix, what is held would lie between what is freed: of an encoder of
    68 MB memory grew by 277.
    """
    from transformers import T5Config, T5EncoderModel

    try:
        with torch.device("meta"):
            model = T5EncoderModel(T5Config.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"{folder} is no T5 encoder's: {reason_of(error)}") from error
    model.requires_grad_(False).to(dtype)
    wide = set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, module in linear:
        own = torch.float32 if wide.intersection(name.split(".")) else dtype
        scale = torch.empty(module.out_features, dtype=own, device="meta")
        model.set_submodule(name, Int8Linear(module.weight.to(torch.int8), scale))
    model.to_empty(device="cpu")
    model.set_input_embeddings(model.shared)
    return model


def _tensors(folder: Path, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Those of a folder's files. A file is opened anew for each: pages that were read of one that
    stays open count as memory of the process.
    """
    variant = variant_of(folder, [folder])
    files = [path for path, own in weights_in(folder).items() if own == variant]
    if not files:
        raise CheckpointError(f"{folder} has no weights as safetensors, and no others are read")
    for file in files:
        with safe_open(file, "pt") as opened:
            names = wanted.intersection(opened.keys())
        for name in sorted(names):
            with safe_open(file, "pt") as opened:
                yield name, opened.get_tensor(name)
