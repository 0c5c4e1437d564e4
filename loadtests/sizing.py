"""From an engine table and a traffic profile to GPUs and money: the arithmetic of `plan`."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.bare import Point
from loadtests.fleet import highest_rate
from loadtests.simulated import SimulatedRow
from loadtests.timing import TimingDouble
from loadtests.traffic import Profile, poisson
from service.batching.scheduler import Limits

NUM_ARRIVALS = 3000  # of a simulated trial: its p95 then stands on 150 requests


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of machine: what its engine takes, and what an hour of one replica costs."""

    name: str
    timing: TimingDouble
    price_per_hour: float

    @classmethod
    def parse(cls, text: str, profile: Profile, overhead_ms: float) -> Machine:
        """``NAME=ENGINE.json@PRICE``, the JSON of `loadtests engine` or of `loadtests gpu`.

        Raises:
            ValueError: another form, no such file, or no points of the profile's size.
        """
        name, equals, rest = text.partition("=")
        path, at, price = rest.rpartition("@")
        if not (equals and at):
            raise ValueError(f"{text!r} is not NAME=ENGINE.json@PRICE_PER_HOUR")
        found = json.loads(Path(path).read_text())
        if "sections" in found:
            timing = timing_of_gpu(name, found["sections"], overhead_ms / 1e3)
        else:
            points = [Point(**point) for point in found["points"]]
            timing = timing_of(name, points, profile.sizes_px[0], overhead_ms / 1e3)
        return cls(name, timing, float(price))

    def saturated(self, profile: Profile) -> float:
        """Images a second when every batch is full."""
        limits, timing = self.timing.limits, self.timing
        step_s = timing.seconds(timing.step, [128] * limits.max_batch) / limits.max_batch
        decode_s = timing.seconds(timing.decode, [128] * limits.max_decode_batch)
        decode_s = decode_s / limits.max_decode_batch + timing.overhead_s
        return 1 / (statistics.fmean(profile.steps) * step_s + decode_s)

    def promised(self, profile: Profile, p95_ms: float) -> float:
        """Images a second at which one replica keeps p95, by simulation."""
        return highest_rate(
            self.timing,
            lambda rate: list(rows_at(rate, profile, NUM_ARRIVALS, seed=1)),
            p95_ms / 1e3,
            self.saturated(profile),
        )


def timing_of(
    name: str, points: list[Point], size_px: int, overhead_s: float = 0.0
) -> TimingDouble:
    """Lines through the calls of the table's first engine, batched as the service batches it.

    Raises:
        ValueError: fewer than two batch sizes of ``size_px``.
    """
    of_size = [point for point in points if point.size_px == size_px]
    if not of_size:
        sizes = sorted({point.size_px for point in points})
        raise ValueError(f"{name}: no engine point of {size_px} px; the table has {sizes}")
    first = of_size[0]
    engine = (first.backend, first.precision)
    one_per_batch = {p.batch: p for p in of_size if (p.backend, p.precision) == engine}
    if len(one_per_batch) < 2:
        raise ValueError(f"{name}: two batch sizes or more are needed, found {[*one_per_batch]}")
    batches = sorted(one_per_batch)
    step = line_through(batches, [one_per_batch[b].step_ms / 1e3 for b in batches])
    decode = line_through(batches, [one_per_batch[b].decode_ms / 1e3 for b in batches])
    limits = Limits(first.served_batch, first.served_decode_batch)
    return TimingDouble(f"{name} ({' '.join(engine)})", step, decode, False, limits, overhead_s)


def timing_of_gpu(
    name: str, sections: dict[str, Any], overhead_s: float = 0.0, max_batch: int = 8
) -> TimingDouble:
    """Lines through the calls of the product's engine in `loadtests gpu`: SD 1.5's LCM, 512 px.

    Of the batches up to ``max_batch``, which is what the overlays' replicas draw by; each batch was
    decoded by calls of ``decode_rows``.

    Raises:
        ValueError: fewer than two batches were measured.
    """
    tables = sections.get("speed", {}).get("tables", {})
    rows = [
        row
        for row in tables.get("SD 1.5 LCM", [])
        if row["engine"] == "product" and row["batch"] <= max_batch
    ]
    if len({row["batch"] for row in rows}) < 2:
        raise ValueError(f"{name}: two batches or more of the product's engine are needed")
    step = line_through([r["batch"] for r in rows], [r["step_ms"] / 1e3 for r in rows])
    decode = line_through([r["decode_rows"] for r in rows], [r["decode_ms"] / 1e3 for r in rows])
    limits = Limits(max_batch, max(row["decode_rows"] for row in rows))
    return TimingDouble(f"{name} (torch fp16)", step, decode, False, limits, overhead_s)


def line_through(batches: list[int], seconds: list[float]) -> tuple[float, float]:
    """Least squares ``fixed + per_row · rows``, neither below 0."""
    per_row, fixed_s = np.polyfit(batches, seconds, 1)
    if fixed_s < 0:
        return 0.0, float(np.dot(batches, seconds) / np.dot(batches, batches))
    return float(fixed_s), max(0.0, float(per_row))


def rows_at(rate: float, profile: Profile, count: int, seed: int) -> Iterator[SimulatedRow]:
    """Poisson arrivals of the profile's steps, all of one size."""
    times = poisson(rate, seed)
    return (SimulatedRow(next(times), ask.num_steps, 128) for ask in profile.asks(count, seed))


def rows_due(times: Iterator[float], profile: Profile, end_s: float) -> Iterator[SimulatedRow]:
    """Arrivals at given times, up to ``end_s``."""
    rng = random.Random(0)
    for time in times:
        if time >= end_s:
            return
        yield SimulatedRow(time, rng.choice(profile.steps), 128)
