"""Textual inversions given as files: words of their own for a pipeline's text encoders.

Becomes rows of the token embedding and tokens of the tokenizer before anything is exported, by
diffusers' own loader; a prompt that names the word then means them, see
`engines.drawing.textual_inversion`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.build.source import SINGLE_FILE
from engines.errors import CheckpointError, reason_of

if TYPE_CHECKING:
    from torch import Tensor

# In SDXL's files, by the pipeline's encoder that a tensor is for.
XL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def load_embeddings(pipeline: Any, files: Mapping[str, Path]) -> None:
    """Teach a diffusers pipeline the words of ``files``, in each of its text encoders.

    Raises:
        CheckpointError: a file is no embedding or one for another base, or the pipeline has the
            word already.
    """
    encoders = [name for name in XL_KEYS if getattr(pipeline, name, None) is not None]
    for word, file in files.items():
        vectors = _read(word, file)
        if set(vectors) != set(encoders):
            raise CheckpointError(
                f"embedding {word!r} ({file}) is for {_listed(vectors)}, this base has "
                f"{_listed(encoders)}: use one that was trained on such a model"
            )
        if len({len(each) for each in vectors.values()}) > 1:
            counts = ", ".join(f"{len(vectors[name])} for {XL_KEYS[name]}" for name in encoders)
            raise CheckpointError(
                f"embedding {word!r} ({file}) has vectors in different numbers ({counts}); it must "
                "be as many for both"
            )
        for name in encoders:
            encoder, found = getattr(pipeline, name), vectors[name]
            width = encoder.get_input_embeddings().embedding_dim
            if found.shape[1] != width:
                raise CheckpointError(
                    f"embedding {word!r} ({file}) has vectors of {found.shape[1]} numbers, this "
                    f"base's {name} takes {width}: use one that was trained on such a model"
                )
            tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
            try:
                pipeline.load_textual_inversion(
                    found, token=word, tokenizer=tokenizer, text_encoder=encoder
                )
            except ValueError as error:
                raise CheckpointError(
                    f"embedding {word!r} ({file}) cannot be loaded by diffusers: "
                    f"{reason_of(error)}; give it another NAME"
                ) from error


def _listed(encoders: Mapping[str, Any] | list[str]) -> str:
    return " and ".join(f"{name} ({XL_KEYS[name]})" for name in XL_KEYS if name in encoders)


def _read(word: str, file: Path) -> dict[str, Tensor]:
    """Vectors float ``[n, D]`` by the encoder that they are for.

    diffusers' files have one tensor under any name, A1111's ``string_to_param`` and more, SDXL's
    one for each encoder. Pickles are read as tensors and plain values alone, no code of theirs
    runs.
    """
    import torch

    try:
        if file.suffix == SINGLE_FILE:
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; all mean the same here
        raise CheckpointError(
            f"embedding {word!r} ({file}) cannot be read: {reason_of(error)}; save it as "
            "safetensors"
        ) from error
    state = state if isinstance(state, Mapping) else {"a tensor": state}
    params = next((state[key] for key in state if str(key).startswith("string_to_param")), state)
    tensors = params if isinstance(params, Mapping) else {"": params}
    vectors = {name: tensors[key] for name, key in XL_KEYS.items() if key in tensors}
    if len(tensors) == 1 and not vectors:
        vectors = {"text_encoder": next(iter(tensors.values()))}
    if not vectors or not all(_are_vectors(value) for value in vectors.values()):
        keys = ", ".join(map(str, list(state)[:4])) or "nothing"
        raise CheckpointError(
            f"embedding {word!r} ({file}) holds {keys}; an embedding holds one tensor, or "
            "string_to_param, or clip_l and clip_g, of one or more vectors"
        )
    return {name: value.detach().reshape(-1, value.shape[-1]) for name, value in vectors.items()}


def _are_vectors(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.ndim in (1, 2) and value.numel() > 0
