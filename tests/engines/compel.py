"""Compel as a peer: embeddings of long and weighted prompts, for diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from compel import ReturnedEmbeddingsType
from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode
from torch import Tensor

from engines.families.recipe import Recipe

Run = tuple[str, float]


class Words(str):
    """A prompt that knows the runs of equal weight that it is to be read as."""

    __slots__ = ("runs",)
    runs: Sequence[Run]

    def __new__(cls, prompt: str, runs: Sequence[Run] | None = None) -> Words:
        self = super().__new__(cls, prompt)
        self.runs = runs or [(prompt, 1.0)]
        return self


def encode(pipeline: Any, wanted: Recipe) -> dict[str, Any]:
    """Arguments of the pipeline that stand for the recipe's `Words`."""
    guided = wanted.guidance_scale > 1
    xl = hasattr(pipeline, "text_encoder_2")
    absent = wanted.negative_prompt is None
    negative = Words("") if absent else wanted.negative_prompt
    texts = [wanted.prompt, *([negative] if guided else [])]
    with torch.inference_mode():
        embeds = _same_length(pipeline, [_embeds(pipeline, text) for text in texts])
        pooled = [_second(pipeline).get_pooled_embeddings([_said(text)]) for text in texts if xl]
    if xl and absent and guided:  # SDXL's zeros
        embeds[1], pooled[1] = torch.zeros_like(embeds[1]), torch.zeros_like(pooled[1])
    names = ("prompt_embeds", "negative_prompt_embeds")
    pooled_names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {
        "prompt": None, "negative_prompt": None,
        **dict(zip(names, embeds, strict=False)), **dict(zip(pooled_names, pooled, strict=False)),
    }  # fmt: skip


def _said(text: Any) -> str:
    return "".join(run for run, _ in text.runs)


def _providers(pipeline: Any) -> list[EmbeddingsProvider]:
    kind = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
    pairs = [(pipeline.tokenizer, pipeline.text_encoder)]
    if hasattr(pipeline, "text_encoder_2"):
        kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        pairs.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    return [
        EmbeddingsProvider(
            tokenizer, encoder, truncate=False, returned_embeddings_type=kind,
            split_long_text_mode=SplitLongTextMode.BRUTAL,
        )
        for tokenizer, encoder in pairs
    ]  # fmt: skip


def _second(pipeline: Any) -> EmbeddingsProvider:
    return _providers(pipeline)[1]


def _embeds(pipeline: Any, text: Any) -> Tensor:
    """``[1, L, D]``"""
    found = []
    for provider in _providers(pipeline):
        words, weights = zip(*text.runs, strict=True)
        tokens, each, _ = provider.get_token_ids_and_expand_weights(list(words), weights, "cpu")
        found.append(provider.build_weighted_embedding_tensor(tokens, each, device="cpu"))
    return torch.cat(found, dim=-1)


def _same_length(pipeline: Any, embeds: Sequence[Tensor]) -> list[Tensor]:
    """With the embeddings of no words behind those that are shorter, as Compel pads."""
    longest = max(each.shape[1] for each in embeds)
    empty = torch.cat([provider.empty_z for provider in _providers(pipeline)], dim=-1)
    return [
        torch.cat([each, *[empty] * ((longest - each.shape[1]) // empty.shape[1])], dim=1)
        for each in embeds
    ]
