"""Doubles that only keep time: how long an engine call takes, as ``fixed + per_row · rows``.

Under the scheduler alone they simulate (`simulate`, `plan`); asleep under a real server they stand
for a GPU (`loadtests.peers.sleeping`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.batching.scheduler import Limits

PIXELS = {96: 0.5625, 128: 1.0}  # relative cost of the two sizes that `simulate` mixes


@dataclass(frozen=True)
class TimingDouble:
    """Seconds of an engine call; with ``by_pixels`` each row is weighted by its size.

    ``overhead_s`` is what each image costs the engine thread besides, between its calls.
    """

    name: str
    step: tuple[float, float]
    decode: tuple[float, float]
    by_pixels: bool
    limits: Limits
    overhead_s: float = 0.0
    encode: tuple[float, float] = (0.0, 0.0)  # of images, by the VAE
    tiny_encode: tuple[float, float] = (0.0, 0.0)
    tiny_decode: tuple[float, float] = (0.0, 0.0)

    def seconds(self, cost: tuple[float, float], sizes: Sequence[int]) -> float:
        rows = sum(PIXELS[size] if self.by_pixels else 1.0 for size in sizes)
        return cost[0] + cost[1] * rows

    def images_per_s(self, num_steps: int, size: int = 128) -> float:
        """Where every batch is full."""
        limits = self.limits
        step_s = self.seconds(self.step, [size] * limits.max_batch) / limits.max_batch
        decode_s = self.seconds(self.decode, [size] * limits.max_decode_batch)
        return 1 / (num_steps * step_s + decode_s / limits.max_decode_batch)

    def step_s(self, group: tuple[int, ...]) -> float:
        """A full denoise call, as `service.batching.scheduler.Costs` has it."""
        return self.seconds(self.step, [group[0]] * self.limits.max_batch)

    def step_fixed_s(self, group: tuple[int, ...]) -> float:
        """The part of a denoise call that does not depend on its rows."""
        return self.step[0]

    def decode_fixed_s(self, decoding: tuple[int, ...]) -> float:
        """The part of a decode call that does not depend on its rows."""
        return self.decode[0]


CPU_SHAPED = TimingDouble(
    "CPU-shaped: 10·rows ms a step", (0.0005, 0.010), (0.0005, 0.025), True, Limits(8, 2)
)
GPU_SHAPED = TimingDouble(
    "GPU-shaped: 12 + 1.2·rows ms a step", (0.012, 0.0012), (0.004, 0.004), False, Limits(8, 8),
    encode=(0.002, 0.002), tiny_encode=(0.001, 0.0005), tiny_decode=(0.001, 0.0005),
)  # fmt: skip
