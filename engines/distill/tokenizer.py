"""The demo models' tokenizer: a true CLIPTokenizer whose small vocabulary knows the world's words.

Byte-level BPE, so that any Unicode text has tokens: known words are one token, others fall apart
into bytes.
"""

from __future__ import annotations

import itertools
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from engines.distill.captions import WORDS

MAX_TOKENS = 32  # start and end included; the longest canonical caption has 22
START, END = "<|startoftext|>", "<|endoftext|>"


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: 256 bytes, 256 final bytes, then each word by left-most merges."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(f"{letter}</w>" for letter in alphabet)])
    merges: dict[tuple[str, str], None] = {}
    # Longer words last: a merge made for a short word is then already there for its longer kin.
    for word in sorted(WORDS, key=lambda w: (len(w), w)):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = next(
                (p for p in merges if any(p == q for q in itertools.pairwise(parts))),
                (parts[0], parts[1]),
            )
            merges.setdefault(pair)
            tokens.setdefault("".join(pair))
            parts = _merge(parts, pair)
    ordered = [*tokens, START, END]
    return {token: index for index, token in enumerate(ordered)}, list(merges)


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def build_tokenizer() -> Any:
    """A CLIPTokenizer padding with the end token to MAX_TOKENS, as Stable Diffusion's does."""
    vocabulary, merges = build_vocabulary()
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token=END, model_max_length=MAX_TOKENS
    )
