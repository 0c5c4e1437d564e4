"""Textual inversion: a word that training added to the tokenizer, and that may be several vectors.

The first vector has the word's own token, `<cat>`, the others follow as `<cat>_1`, `<cat>_2` …, so
a tokenizer alone says how many there are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

from tokenizers import Tokenizer


def expand(tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt with the tokens of all its words' vectors written out.

    Agrees with `maybe_convert_prompt` of diffusers' loaders/textual_inversion.py.
    """
    words = _words_of_several(tokenizer)
    if words:
        for token in dict.fromkeys(tokenizer.encode(prompt, add_special_tokens=False).tokens):
            prompt = prompt.replace(token, words.get(token, token))
    return prompt


@functools.lru_cache(maxsize=16)  # a tokenizer is not added to once it is loaded
def _words_of_several(tokenizer: Tokenizer) -> Mapping[str, str]:
    """Word → the tokens of its vectors, where it has more than one."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    words = {}
    for word in added:
        further = (f"{word}_{number}" for number in itertools.count(1))
        vectors = [word, *itertools.takewhile(added.__contains__, further)]
        if len(vectors) > 1:
            words[word] = " ".join(vectors)
    return words
