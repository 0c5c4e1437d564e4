"""Regions on one clock: what is asked of each, how it is run, who helps whom."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from loadtests.curve import MOST, LoadCurve
from loadtests.fleet import Autoscaling
from loadtests.region import Region, Sums, Supply
from loadtests.traffic import synthetic_day

DAY_S = 86_400
SPILL_FROM, SPILL_TO = 0.9, 0.7  # shares of what replicas keep up with: sends away, takes


@dataclass(frozen=True)
class Place:
    """A region: its share of GPUs and traffic, and its hours before UTC."""

    name: str
    share: float
    utc_offset_h: float

    @classmethod
    def parse(cls, text: str) -> Place:
        """``NAME=SHARE@HOURS``.

        Raises:
            ValueError: another form.
        """
        name, equals, rest = text.partition("=")
        share, at, offset = rest.partition("@")
        if not (name and equals and at):
            raise ValueError(f"{text!r} is not NAME=SHARE@HOURS_BEFORE_UTC")
        return cls(name, float(share), float(offset))


@dataclass(frozen=True)
class Policy:
    """A way to run the day."""

    name: str
    config: Autoscaling  # of all GPUs; each region has its share
    spot_share: float = 0.0
    spill: bool = False


@dataclass(frozen=True)
class Loss:
    """A zone that is gone for a while."""

    region: str
    at_s: float
    for_s: float


@dataclass(frozen=True)
class World:
    """What is the same whatever the policy is."""

    curve: LoadCurve
    places: tuple[Place, ...]
    supply: Supply  # of all regions together
    peak: float  # images a second, were all regions at theirs at once
    loss: Loss
    far_s: float  # to another region and back

    def rate(self, place: Place) -> Callable[[float], float]:
        """Images a second at a second of the UTC day."""
        local = synthetic_day(self.peak * place.share, DAY_S)
        return lambda time: local(time + 3600 * place.utc_offset_h)

    def supply_of(self, place: Place, policy: Policy) -> Supply:
        gpus = round(self.supply.gpus * place.share)
        return dataclasses.replace(self.supply, gpus=gpus, spot_share=policy.spot_share)

    def region(self, place: Place, policy: Policy, ready: int, seed: int) -> Region:
        config = dataclasses.replace(
            policy.config,
            min_replicas=round(policy.config.min_replicas * place.share),
            max_replicas=round(policy.config.max_replicas * place.share),
        )
        return Region(self.curve, config, self.supply_of(place, policy), ready, seed)


def run(world: World, policy: Policy, end_s: int = DAY_S) -> dict[str, Sums]:
    """The UTC day up to ``end_s``, region by region, a second at a time."""
    rates = {place.name: world.rate(place) for place in world.places}
    regions = {}
    for seed, place in enumerate(world.places):
        load = min(MOST, world.curve.load_at(policy.config.target_ongoing_requests))
        needed = math.ceil(rates[place.name](0) / (load * world.curve.saturated))
        low = round(policy.config.min_replicas * place.share)
        regions[place.name] = world.region(place, policy, max(needed, low), seed)
    loss = world.loss
    for now in range(end_s):
        if now <= loss.at_s < now + 1:
            regions[loss.region].lose_zone(0)
        if now <= loss.at_s + loss.for_s < now + 1:
            regions[loss.region].find_zone(0)
        due = {name: rate(now) for name, rate in rates.items()}
        far = spilled(regions, due) if policy.spill else dict.fromkeys(due, 0.0)
        for name, each in regions.items():
            # What leaves is negative, what comes is positive.
            each.tick(now, due[name] + far[name], far=max(0.0, far[name]), far_s=world.far_s)
    return {name: each.sums for name, each in regions.items()}


def spilled(regions: dict[str, Region], due: dict[str, float]) -> dict[str, float]:
    """Images a second that go (negative) or come, so that who has room helps who has none."""
    over = {
        name: max(0.0, due[name] - SPILL_FROM * each.capacity()) for name, each in regions.items()
    }
    room = {
        name: 0.0 if over[name] else max(0.0, SPILL_TO * each.capacity() - due[name])
        for name, each in regions.items()
    }
    moved = min(sum(over.values()), sum(room.values()))
    if not moved:
        return dict.fromkeys(due, 0.0)
    out, into = moved / sum(over.values()), moved / sum(room.values())
    return {name: room[name] * into - over[name] * out for name in due}


def total(outcome: dict[str, Sums]) -> Sums:
    found = Sums()
    for each in outcome.values():
        found.add(each)
    return found
