"""What a row says to the text encoder, in windows of tokens, and what conditioning comes of it.

A text that is longer than the window may go on in further ones, its chunks: each has its marks of
begin and end and is encoded by itself, and what is said of their tokens is put side by side. What
is said of a text as a whole, as SDXL's pooled embedding, is said of its first chunk. Both as in
Compel (`EmbeddingsProvider`), cut where a window ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from engines.drawing.prompts import Encoded, Tokens, key_of, slerp
from engines.drawing.textual_inversion import expand
from engines.facts import Window
from engines.families.family import Lanewise

NUM_MARKS = 2  # begin and end, of a window


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt as the text encoder takes it."""

    chunks: tuple[Tokens, ...]  # one at least
    num_truncated: int = 0  # tokens that found no room in them

    def filled(self, num_chunks: int, blank: Tokens) -> Text:
        """With chunks that say nothing, up to that number."""
        return Text(self.chunks + (blank,) * (num_chunks - len(self.chunks)), self.num_truncated)


def cut(
    prompt: str, windows: Sequence[Window], tokenizers: Mapping[str, Tokenizer], max_chunks: int
) -> Text:
    """A prompt in as many chunks as it fills, at most ``max_chunks``; the rest is lost."""
    chunks, lost = [], []
    for window in windows:
        tokenizer = tokenizers[window.tokenizer]
        begin, *ids, end = tokenizer.encode(expand(tokenizer, prompt)).ids
        room = window.max_tokens - NUM_MARKS
        starts = range(0, max(1, len(ids)), room)[:max_chunks]
        lost.append(max(0, len(ids) - room * max_chunks))
        chunks.append([_fill(window, [begin, *ids[at : at + room], end]) for at in starts])
    blanks = [_fill(window, [begin, end]) for window in windows]
    return Text(
        tuple(
            {
                window.input: blank if own is None else own
                for window, own, blank in zip(windows, each, blanks, strict=True)
            }
            for each in itertools.zip_longest(*chunks)
        ),
        max(lost),
    )


def _fill(window: Window, ids: list[int]) -> np.ndarray:
    """int64 ``[L]``"""
    padding = [window.pad_token_id] * (window.max_tokens - len(ids))
    return np.asarray(ids + padding, np.int64)


@dataclass(frozen=True, slots=True)
class Texts:
    """All of a row's, each of as many chunks as the longest has."""

    lanes: tuple[Text | None, ...]  # the prompt, then what guidance leads away from
    blends: tuple[tuple[Text, float], ...] = ()  # what the prompt moves towards, and how far

    @classmethod
    def of(
        cls, lanes: Sequence[Text | None], blends: Sequence[tuple[Text, float]], blank: Text
    ) -> Texts:
        """``blank`` is the text of no words, which fills up those that are shorter."""
        found = [text for text in lanes if text is not None] + [text for text, _ in blends]
        longest = max(len(text.chunks) for text in found)
        (blank_chunk,) = blank.chunks
        return cls(
            tuple(None if text is None else text.filled(longest, blank_chunk) for text in lanes),
            tuple((text.filled(longest, blank_chunk), share) for text, share in blends),
        )

    @property
    def all(self) -> Iterable[Text]:
        return (*(text for text in self.lanes if text), *(text for text, _ in self.blends))

    @property
    def num_chunks(self) -> int:
        return len(next(iter(self.all)).chunks)

    @property
    def tokens(self) -> Iterable[Tokens]:
        """What the text encoder must have seen before the row can step."""
        return (tokens for text in self.all for tokens in text.chunks)

    def conditioning(
        self, known: Mapping[bytes, Encoded], tokenwise: Sequence[str]
    ) -> dict[str, Lanewise]:
        """What the text encoder said of each lane's text; zeros for a lane that is to have none.

        ``known`` has what it said of all `tokens`, of which ``tokenwise`` is said token by token.
        """
        found = [None if text is None else _said_of(text, known, tokenwise) for text in self.lanes]
        for text, share in self.blends:  # of the prompt alone: what guidance leads away from stays
            start, end = found[0], _said_of(text, known, tokenwise)
            assert start is not None, "a prompt is a text"
            found[0] = {name: slerp(value, end[name], share) for name, value in start.items()}
        sample = next(encoded for encoded in found if encoded is not None)
        return {
            name: tuple(torch.zeros_like(like) if each is None else each[name] for each in found)
            for name, like in sample.items()
        }


def _said_of(text: Text, known: Mapping[bytes, Encoded], tokenwise: Sequence[str]) -> Encoded:
    said = [known[key_of(tokens)] for tokens in text.chunks]
    if len(said) == 1:
        return said[0]
    return {**said[0], **{name: torch.cat([each[name] for each in said]) for name in tokenwise}}
