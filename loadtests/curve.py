"""What one replica does at each load: latency and requests in hand, by the product's scheduler.

It is measured once, in simulated time, so that ten thousand replicas can be counted by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtests.fleet import Fleet, fixed
from loadtests.sizing import rows_at
from loadtests.timing import TimingDouble
from loadtests.traffic import Profile

LOADS = (0.02, *(round(0.05 * step, 2) for step in range(1, 20)))  # of the saturated rate
MOST = LOADS[-1]  # beyond it a queue grows
SHARES = np.arange(0.5, 100) / 100  # of requests: the middles of a hundred equal parts


@dataclass(frozen=True)
class LoadCurve:
    """One replica under Poisson arrivals, at `LOADS` of what it draws with every batch full."""

    saturated: float  # images a second
    quantiles_s: NDArray[np.float64]  # [loads, 100] latency of each hundredth of the requests
    ongoing: NDArray[np.float64]  # [loads] requests in hand, on average

    @classmethod
    def measure(
        cls, timing: TimingDouble, profile: Profile, saturated: float, count: int
    ) -> LoadCurve:
        """``count`` requests at each load.

        A replica's arrivals are its own Poisson process: each node's proxy counts just the requests
        that it sent itself, so that of many proxies' least-connections little but chance is left.
        """
        quantiles, ongoing = [], []
        for load in LOADS:
            rate = load * saturated
            rows = rows_at(rate, profile, count, seed=1)
            latencies = np.array(Fleet(timing, fixed(1)).run(rows).latencies_s)
            quantiles.append(np.quantile(latencies, SHARES))
            ongoing.append(rate * float(latencies.mean()))  # Little's law
        return cls(saturated, np.array(quantiles), np.array(ongoing))

    def latencies_s(self, load: float) -> NDArray[np.float64]:
        """[100] at any load, between the two that were measured beside it."""
        place = float(np.interp(load, LOADS, range(len(LOADS))))
        low, share = math.floor(place), place % 1
        high = min(low + 1, len(LOADS) - 1)
        found: NDArray[np.float64] = (
            self.quantiles_s[low] * (1 - share) + self.quantiles_s[high] * share
        )
        return found

    def ongoing_at(self, load: float) -> float:
        return float(np.interp(load, (0.0, *LOADS), (0.0, *self.ongoing)))

    def load_at(self, ongoing: float) -> float:
        """The load that leaves so many requests in a replica's hands: what a target means."""
        return float(np.interp(ongoing, (0.0, *self.ongoing), (0.0, *LOADS)))
