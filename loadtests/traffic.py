"""What is asked and when: prompts, step counts, sizes; Poisson arrivals; a day of traffic.

Everything is drawn from a seed, so that two systems, or two runs, meet the same requests.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = ("star", "heart", "house", "moon", "circle", "square")
COLORS = ("red", "teal", "purple", "orange", "pink", "green", "blue", "white")


@dataclass(frozen=True, slots=True)
class Ask:
    """One image that a client wants."""

    prompt: str
    seed: int
    num_steps: int
    size_px: int

    def body(self) -> dict[str, Any]:
        """As `POST /v1/images/generations` takes it; every peer reads the same."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "num_inference_steps": self.num_steps,
            "size": f"{self.size_px}x{self.size_px}",
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of traffic: step counts and sizes, each drawn with equal weight."""

    name: str
    steps: tuple[int, ...]
    sizes_px: tuple[int, ...] = (128,)

    def asks(self, count: int, seed: int) -> list[Ask]:
        rng = random.Random(seed)
        return [
            Ask(_prompt(rng), index, rng.choice(self.steps), rng.choice(self.sizes_px))
            for index in range(count)
        ]


def _prompt(rng: random.Random) -> str:
    shape, color, ground = rng.choice(SHAPES), *rng.sample(COLORS, 2)
    return f"a large {color} {shape} at the center on a {ground} background"


UNIFORM = Profile("uniform", (4,))
MIXED = Profile("mixed", (1, 2, 4, 8))
SIZES = Profile("sizes", (1, 2, 4, 8), (96, 128))
PROFILES = {profile.name: profile for profile in (UNIFORM, MIXED, SIZES)}


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests are due, without end, ``rate`` a second."""
    rng = random.Random(seed)
    return itertools.accumulate(iter(lambda: rng.expovariate(rate), None))


def until(times: Iterator[float], seconds: float) -> list[float]:
    """Those before ``seconds``."""
    return list(itertools.takewhile(lambda time: time < seconds, times))


def varying(rate: Callable[[float], float], peak: float, seed: int) -> Iterator[float]:
    """Poisson arrivals whose rate changes with time: thinning (Lewis and Shedler, 1979)."""
    rng = random.Random(seed ^ 0x5EED)
    return (time for time in poisson(peak, seed) if rng.random() * peak < rate(time))


def synthetic_day(peak: float, day_s: float) -> Callable[[float], float]:
    """A product's day: a fifth of ``peak`` at night, two humps, and three bursts to the peak."""
    bursts = [(0.38, 0.004), (0.58, 0.006), (0.83, 0.004)]  # when, how long, as shares of the day

    def rate(time: float) -> float:
        x = (time / day_s) % 1.0
        if any(begin <= x < begin + length for begin, length in bursts):
            return peak
        morning = math.exp(-(((x - 0.45) / 0.10) ** 2))
        evening = math.exp(-(((x - 0.80) / 0.08) ** 2))
        return peak * (0.2 + 0.5 * max(morning, evening))

    return rate


def recorded_day(path: Path) -> tuple[Callable[[float], float], float, float]:
    """A CSV of ``seconds,requests_per_second`` in steps: the rate, its peak, its length.

    Raises:
        ValueError: a line that is not two numbers, or times that do not grow.
    """
    rows: list[tuple[float, float]] = []
    with path.open(newline="") as file:
        for number, line in enumerate(csv.reader(file), start=1):
            if number == 1 and line[:1] == ["seconds"]:
                continue
            try:
                time, value = (float(cell) for cell in line)
            except ValueError:
                raise ValueError(
                    f"{path} line {number} is {','.join(line)!r}; write seconds,requests_per_second"
                ) from None
            if value < 0 or (rows and time <= rows[-1][0]):
                raise ValueError(f"{path} line {number}: times must grow and rates be 0 or more")
            rows.append((time, value))
    if len(rows) < 2:
        raise ValueError(f"{path} has {len(rows)} rates; a day needs two or more")

    def rate(time: float) -> float:
        return next((value for begin, value in reversed(rows) if begin <= time), rows[0][1])

    return rate, max(value for _, value in rows), rows[-1][0]
