"""Textual inversion: a word that training added to the tokenizer, and that may be several vectors.

The first vector has the word's own token, `<cat>`, the others follow as `<cat>_1`, `<cat>_2` …, so
a tokenizer alone says how many there are.
"""

from __future__ import annotations

import itertools

from tokenizers import Tokenizer


def expand(tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt with the tokens of all its words' vectors written out.

    Agrees with `maybe_convert_prompt` of diffusers' loaders/textual_inversion.py.
    """
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if not any(f"{word}_1" in added for word in added):
        return prompt
    for word in dict.fromkeys(tokenizer.encode(prompt, add_special_tokens=False).tokens):
        if word in added:
            further = (f"{word}_{number}" for number in itertools.count(1))
            vectors = itertools.takewhile(added.__contains__, further)
            prompt = prompt.replace(word, " ".join([word, *vectors]))
    return prompt
