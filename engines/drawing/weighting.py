"""Weights in a prompt, in the syntax that A1111 made known: a text in runs of one weight each.

    (word)       1.1 times          (word:1.3)   1.3 times
    [word]       1 / 1.1 times      \\( \\) \\[ \\] \\\\   the character itself

Brackets nest, their factors multiply; one that is never closed reaches to the end. What stands
between them means what diffusers' community pipelines (`lpw_stable_diffusion`) take it for, but for
BREAK, which is a word here.
"""

from __future__ import annotations

import itertools
import re

from engines.errors import InvalidInput

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_WEIGHT = 10.0  # of a run; pictures come apart from about 2 on
PIECE = re.compile(
    r"\\(?P<literal>[()\[\]\\])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|.", re.S
)


def runs_of(prompt: str, field: str = "prompt") -> list[tuple[str, float]]:
    """Texts, one after the other, each with its weight; none of a prompt without words.

    Raises:
        InvalidInput: ``field`` gives a weight above `MAX_WEIGHT`, or below its negative.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where they were, in `pieces`

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in PIECE.finditer(prompt):
        text = match[0]
        if text in opened:
            opened[text].append(len(pieces))
        elif match["weight"] and opened["("]:
            close("(", float(match["weight"]))
        elif text == ")" and opened["("]:
            close("(", ROUND)
        elif text == "]" and opened["["]:
            close("[", SQUARE)
        else:
            pieces.append((match["literal"] or text, 1.0))
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        while opened[bracket]:
            close(bracket, factor)
    found = []
    for weight, each in itertools.groupby(pieces, key=lambda piece: piece[1]):
        text = "".join(piece for piece, _ in each)
        if abs(weight) > MAX_WEIGHT:
            raise InvalidInput(
                field,
                weight,
                f"{field} gives {text.strip()[:40]!r} the weight {weight:g}; it must be from "
                f"{-MAX_WEIGHT:g} to {MAX_WEIGHT:g}, brackets within brackets included",
            )
        found.append((text, weight))
    return found
