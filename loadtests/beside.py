"""Requests alone and beside something else, in turns within one run and on the same arrivals.

One run after the other says little on a shared machine: what it does alone has differed by 30 %
within minutes. So alone and beside follow each other, every second round the other way about, and
what is reported is the median of the rounds' ratios, with the lowest and the highest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm import tqdm

from loadtests.client import Answer, Client, summarise
from loadtests.traffic import Profile, poisson, until

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Turn(Generic[K, T]):
    """Of one round: the answers alone, those beside ``other``, and what that came to."""

    index: int
    other: K
    alone: list[Answer]
    beside: list[Answer]
    outcome: T

    @property
    def p95_ratio(self) -> float:
        return summarise(self.beside)["p95_ms"] / summarise(self.alone)["p95_ms"]


def in_turns(
    client: Client,
    profile: Profile,
    rate: float,
    seconds: float,
    rounds: int,
    others: Mapping[K, Callable[[], AbstractContextManager[T]]],
) -> list[Turn[K, T]]:
    """Each round: Poisson arrivals at ``rate`` alone, and the same within each of ``others``."""
    turns = []
    for index in tqdm(range(rounds), desc="alone and beside", unit="round"):
        due = until(poisson(rate, index), seconds) or [0.0]
        asks = profile.asks(len(due), index)
        alone: list[Answer] = [] if index % 2 else client.open_loop(asks, due)
        found = []
        for other, opened in others.items():
            with opened() as outcome:
                beside = client.open_loop(asks, due)
            found.append((other, beside, outcome))
        alone = alone or client.open_loop(asks, due)
        turns += [Turn(index, other, alone, beside, outcome) for other, beside, outcome in found]
    return turns


def ratio_of(turns: Sequence[Turn[K, T]]) -> dict[str, float]:
    """p95 beside over alone: the median of the turns, the lowest and the highest."""
    ratios = [turn.p95_ratio for turn in turns]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def pooled(rounds: Sequence[list[Answer]]) -> dict[str, float]:
    """Percentiles and errors over the answers of all rounds, which have no rate together."""
    found = summarise([answer for each in rounds for answer in each])
    del found["images_per_s"]
    return found
