"""What one process draws with, and what it has to say; both travel as JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DECODERS = ("full", "tiny")
# By the wall's, or the seconds that the process had of a core: other work hardly stretches those,
# and of one thread they are what it would wait for alone.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
PROMPT = "a lighthouse in a storm, oil on canvas"
SEED = 7


@dataclass(frozen=True)
class Kind:
    """One way to draw. ``packages``: of the extra ``laptop``, in an environment of their own."""

    name: str  # of a function of `loadtests.laptop.ways`
    title: str
    precision: str  # fp32, bf16, int8, or w8: weights in 8 bits, arithmetic in bf16
    packages: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name}:{self.precision}"


@dataclass(frozen=True)
class Task:
    """A process's work: a way over a checkpoint and the tiny VAE beside it."""

    way: str
    precision: str
    checkpoint: Path
    tiny_vae: Path
    cache_dir: Path
    size_px: int
    num_steps: int
    num_threads: int
    clock: str  # of `CLOCKS`
    pixels: Path  # where the picture of ``num_steps`` by the full decoder goes, as .npy

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Task:
        values = json.loads(text)
        for name in ("checkpoint", "tiny_vae", "cache_dir", "pixels"):
            values[name] = Path(values[name])
        return cls(**values)


@dataclass
class Drawn:
    """Seconds of one process's calls by its clock, and its memory.

    ``first_s`` is the first image, of a step and the tiny decoder; ``image_s`` a later one of
    ``num_steps`` and the full decoder. The others are calls of later ones.
    """

    load_s: float = 0.0
    image_s: float = 0.0
    first_s: float = 0.0
    num_steps: int = 0
    step_s: list[float] = field(default_factory=list)
    decode_s: dict[str, float] = field(default_factory=dict)  # by decoder
    peak_flops_per_s: float = 0.0  # of a matrix product in the same precision, here and now
    peak_gb: float = 0.0
    note: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Drawn:
        values: dict[str, Any] = json.loads(text)
        return cls(**values)
