"""What a row says to the text encoder, in windows of tokens, and what conditioning comes of it.

A text that is longer than the window may go on in further ones, its chunks: each has its marks of
begin and end and is encoded by itself, and what is said of their tokens is put side by side. What
is said of a text as a whole, as SDXL's pooled embedding, is said of its first chunk. A weight moves
what is said of a token away from what is said in its place of no words at all, or towards it:
z₀ + w · (z - z₀). All three as in Compel (`EmbeddingsProvider`), cut where a window ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from engines.drawing.prompts import Encoded, Tokens, key_of, slerp
from engines.drawing.textual_inversion import expand
from engines.facts import Window
from engines.families.family import Lanewise

Word = tuple[int, float]  # a token and its weight


class Chunk(NamedTuple):
    """What fills a window once."""

    tokens: Tokens
    weights: Tensor | None = None  # float32 [L, 1] of each token, where any is not 1


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt as the text encoder takes it."""

    chunks: tuple[Chunk, ...]  # one at least
    num_truncated: int = 0  # tokens that found no room in them

    def filled(self, num_chunks: int, blank: Chunk) -> Text:
        """With chunks that say nothing, up to that number."""
        return Text(self.chunks + (blank,) * (num_chunks - len(self.chunks)), self.num_truncated)


def cut(
    runs: Sequence[tuple[str, float]],
    windows: Sequence[Window],
    tokenizers: Mapping[str, Tokenizer],
    max_chunks: int,
) -> Text:
    """Runs of a prompt, each with its weight, in as many chunks as they fill, at most
    ``max_chunks``; the rest is lost.

    Where there are several windows, their tokenizers have the same words in the same places, as
    SDXL's have: weights are those of the first.
    """
    begin, end = _marks(tokenizers[windows[0].tokenizer])
    room = windows[0].max_tokens - len(begin) - len(end)
    words = [list(_words(window, tokenizers[window.tokenizer], runs)) for window in windows]
    longest = max(map(len, words))
    chunks = [
        Chunk(
            {
                window.input: _fill(window, tokenizers[window.tokenizer], own[at : at + room])
                for window, own in zip(windows, words, strict=True)
            },
            _weights(windows[0].max_tokens, len(begin), words[0][at : at + room]),
        )
        for at in range(0, max(1, longest), room)[:max_chunks]
    ]
    return Text(tuple(chunks), max(0, longest - room * max_chunks))


def _words(
    window: Window, tokenizer: Tokenizer, runs: Sequence[tuple[str, float]]
) -> Iterator[Word]:
    for run, weight in runs:
        text = expand(tokenizer, window.written(run))
        for token in tokenizer.encode(text, add_special_tokens=False).ids:
            yield token, weight


def _fill(window: Window, tokenizer: Tokenizer, words: Sequence[Word]) -> np.ndarray:
    """int64 ``[L]``: ids between marks."""
    begin, end = _marks(tokenizer)
    ids = [*begin, *(token for token, _ in words), *end]
    padding = [window.pad_token_id] * (window.max_tokens - len(ids))
    return np.asarray(ids + padding, np.int64)


@functools.lru_cache(maxsize=16)  # a tokenizer is not added to once it is loaded
def _marks(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before a text, if anything does, and after it."""
    ids = tokenizer.encode("").ids
    return ids[:-1], ids[-1:]


def _weights(max_tokens: int, first: int, words: Sequence[Word]) -> Tensor | None:
    weights = [weight for _, weight in words]
    if all(weight == 1 for weight in weights):
        return None
    found = torch.ones(max_tokens, 1)
    found[first : first + len(weights), 0] = torch.tensor(weights)
    return found


@dataclass(frozen=True, slots=True)
class Texts:
    """All of a row's, each of as many chunks as the longest has."""

    lanes: tuple[Text | None, ...]  # the prompt, then what guidance leads away from
    blends: tuple[tuple[Text, float], ...] = ()  # what the prompt moves towards, and how far
    blank: Chunk | None = None  # of no words, where weights lead away from it

    @classmethod
    def of(
        cls,
        lanes: tuple[Text | None, ...],
        blends: tuple[tuple[Text, float], ...],
        blank: Callable[[], Text],
    ) -> Texts:
        """``blank`` makes the text of no words: it fills up those that are shorter."""
        plain = cls(lanes, blends)
        chunks = [chunk for text in plain.all for chunk in text.chunks]
        if len(chunks) == len(plain.all) and all(chunk.weights is None for chunk in chunks):
            return plain
        longest = max(len(text.chunks) for text in plain.all)
        (nothing,) = blank().chunks
        return cls(
            tuple(None if text is None else text.filled(longest, nothing) for text in lanes),
            tuple((text.filled(longest, nothing), share) for text, share in blends),
            nothing if any(chunk.weights is not None for chunk in chunks) else None,
        )

    @property
    def all(self) -> Sequence[Text]:
        return (*(text for text in self.lanes if text), *(text for text, _ in self.blends))

    @property
    def num_chunks(self) -> int:
        return len(self.all[0].chunks)

    @property
    def tokens(self) -> Sequence[Tokens]:
        """What the text encoder must have seen before the row can step."""
        own = [chunk.tokens for text in self.all for chunk in text.chunks]
        return own if self.blank is None else [*own, self.blank.tokens]

    def conditioning(
        self, known: Mapping[bytes, Encoded], tokenwise: Sequence[str]
    ) -> dict[str, Lanewise]:
        """What the text encoder said of each lane's text; zeros for a lane that is to have none.

        ``known`` has what it said of all `tokens`, of which ``tokenwise`` is said token by token.
        """
        found = [
            None if text is None else self._said_of(text, known, tokenwise) for text in self.lanes
        ]
        for text, share in self.blends:  # of the prompt alone: what guidance leads away from stays
            start, end = found[0], self._said_of(text, known, tokenwise)
            assert start is not None, "a prompt is a text"
            found[0] = {name: slerp(value, end[name], share) for name, value in start.items()}
        sample = next(encoded for encoded in found if encoded is not None)
        return {
            name: tuple(torch.zeros_like(like) if each is None else each[name] for each in found)
            for name, like in sample.items()
        }

    def _said_of(
        self, text: Text, known: Mapping[bytes, Encoded], tokenwise: Sequence[str]
    ) -> Encoded:
        said = [known[key_of(chunk.tokens)] for chunk in text.chunks]
        if len(said) == 1 and text.chunks[0].weights is None:
            return said[0]
        nothing = None if self.blank is None else known[key_of(self.blank.tokens)]
        joined = {}
        for name in tokenwise:
            values = [
                encoded[name]
                if chunk.weights is None or nothing is None
                else _weighted(encoded[name], nothing[name], chunk.weights)
                for chunk, encoded in zip(text.chunks, said, strict=True)
            ]
            joined[name] = torch.cat(values)
        return {**said[0], **joined}


def _weighted(said: Tensor, blank: Tensor, weights: Tensor) -> Tensor:
    """``[L, D]``; to the bit what was said where a weight is 1."""
    weights = weights.to(said.device)
    return torch.where(weights == 1, said, blank + weights * (said - blank))
