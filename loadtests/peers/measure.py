"""One peer, started alone and measured: throughput at saturation, latency at given rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests.client import Answer, Client, require_answers
from loadtests.peers import Peer
from loadtests.serving import Service, running
from loadtests.traffic import Profile, poisson, until
from service.ray_serve.environment import free_port

NUM_CLIENTS = 32  # of the closed loop: four batches of eight, so that none ever waits for clients
NUM_WARM_UP = 16
MAX_RATE = 1000.0  # images/s; bounds what a closed loop is given to send


@dataclass(frozen=True, slots=True)
class Saturation:
    """What a peer did while it always had work."""

    images_per_s: float
    cpu_s_per_image: float
    memory_mib: float


@contextmanager
def started(
    peer: Peer, python: Path, model: str, cache_dir: Path, options: list[str]
) -> Iterator[Probe]:
    port = free_port()
    command = peer.command(python, model, cache_dir, port, options)
    with running(command, port, peer.ready_path) as service:
        yield Probe(peer, service)


class Probe:
    """A running peer and its client."""

    def __init__(self, peer: Peer, service: Service) -> None:
        self._peer, self._service = peer, service
        self._client = Client(service.url, peer.path, peer.body)

    def warm_up(self, profile: Profile) -> None:
        """Connections, caches, and what adaptive batching learns of the engine."""
        answers = self._client.closed_loop(profile.asks(NUM_WARM_UP, seed=0), 8)
        require_answers(answers, self._peer.title)

    def saturation(self, profile: Profile, seconds: float, seed: int) -> Saturation:
        asks = profile.asks(round(MAX_RATE * min(seconds, 60.0)), seed)
        before = self._service.cpu_s()
        answers = self._client.closed_loop(asks, NUM_CLIENTS, seconds)
        used = self._service.cpu_s() - before
        require_answers(answers, self._peer.title)
        done = sorted(answer.done_s for answer in answers)
        # Between the first and the last answer in time the peer always had a full line of clients.
        steady = [time for time in done if time <= seconds]
        if len(steady) < NUM_CLIENTS:  # too slow for that: all of them, up to the last
            rate = len(done) / done[-1]
        else:
            rate = (len(steady) - 1) / (steady[-1] - steady[0])
        return Saturation(rate, used / len(answers), self._service.memory_mib())

    def at_rate(self, profile: Profile, rate: float, seconds: float, seed: int) -> list[Answer]:
        due_s = until(poisson(rate, seed), seconds) or [0.0]
        answers = self._client.open_loop(profile.asks(len(due_s), seed), due_s)
        require_answers(answers, self._peer.title)
        return answers


def interleaved(peers: Sequence[Peer], rounds: int, work: Callable[[Peer, int], None]) -> None:
    """Every peer once a round, each round in another order, so that drift favours nobody."""
    for index in range(rounds):
        shift = index % len(peers)
        for peer in (*peers[shift:], *peers[:shift]):
            work(peer, index)
