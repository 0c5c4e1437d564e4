"""All that a run of `peers` measured, by profile, load and peer."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from loadtests.client import Answer, Latencies
from loadtests.peers import PEERS, Peer
from loadtests.peers.measure import Saturation

LOADS = (0.5, 0.7)
OURS = PEERS[0]
NEARLY_FULL = 0.97  # of a peer's capacity; beyond, a queue grows for as long as one measures


@dataclasses.dataclass
class Findings:
    """Saturation by (profile, peer), answers by (profile, load, peer)."""

    saturation: dict[tuple[str, str], list[Saturation]] = dataclasses.field(default_factory=dict)
    rates: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    answers: dict[tuple[str, str, str], list[Answer]] = dataclasses.field(default_factory=dict)

    def capacity(self, profile: str, peer: str) -> float:
        return statistics.median(s.images_per_s for s in self.saturation[profile, peer])

    def best(self, profile: str) -> str:
        """The name of the peer with the highest throughput."""
        others = {peer for of, peer in self.saturation if of == profile} - {OURS.name}
        return max(others, key=lambda peer: self.capacity(profile, peer))

    def choose_rates(
        self, profile: str, peers: Sequence[Peer], loads: Sequence[float] = LOADS
    ) -> None:
        """These shares of the capacity of the weakest peer, the best one, and Fourstep."""
        others = [self.capacity(profile, peer.name) for peer in peers if peer is not OURS]
        whose = {"the weakest": min(others)} if len(others) > 1 else {}
        whose["the best peer"] = max(others)
        whose["Fourstep"] = self.capacity(profile, OURS.name)
        for name, capacity in whose.items():
            for load in loads:
                self.rates[profile, f"{load:.0%} of {name}"] = load * capacity

    def keeps_up(self, profile: str, load: str, peer: str) -> bool:
        return self.rates[profile, load] <= NEARLY_FULL * self.capacity(profile, peer)

    def latencies(self, profile: str, load: str, peer: str) -> Latencies:
        """Empty where the peer was not asked at this load."""
        answers = self.answers.get((profile, load, peer), [])
        return Latencies(answer.latency_s for answer in answers)

    def first_byte(self, profile: str, load: str, peer: str) -> Latencies:
        answers = self.answers.get((profile, load, peer), [])
        return Latencies(answer.first_byte_s - answer.due_s for answer in answers)

    def to_json(self) -> dict[str, Any]:
        saturation = [
            {"profile": profile, "peer": peer, "rounds": [dataclasses.asdict(s) for s in rounds]}
            for (profile, peer), rounds in self.saturation.items()
        ]
        latency = [
            {
                "profile": profile,
                "load": load,
                "images_per_s": self.rates[profile, load],
                "peer": peer,
                **self.latencies(profile, load, peer).summary(),
                "first_byte_p50_ms": self.first_byte(profile, load, peer).ms(50),
                "num_requests": len(answers),
            }
            for (profile, load, peer), answers in self.answers.items()
        ]
        return {"saturation": saturation, "latency": latency}
