"""What Fourstep is compared with: one runnable file for each, configured as its own documentation
recommends, over the same bundle and the same engine. Object to any of them by editing it.

Each is started as `python -m loadtests.peers.<name> --model … --cache-dir … --port …`, listens on
loopback, takes the same JSON of one image and answers with a PNG.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.client import PATH
from loadtests.traffic import Ask


@dataclass(frozen=True, slots=True)
class Peer:
    """How to start one and how to ask it. ``own_python``: it lives in the peers' environment."""

    name: str
    title: str
    path: str
    ready_path: str
    body: Callable[[Ask], Any] = Ask.body
    own_python: bool = False
    takes_engine: bool = True  # False: it brings an engine of its own

    def command(
        self, python: Path, model: str, cache_dir: Path, port: int, options: list[str]
    ) -> list[str]:
        interpreter = str(python) if self.own_python else sys.executable
        module = [interpreter, "-m", f"loadtests.peers.{self.name}"]
        where = ["--model", model, "--cache-dir", str(cache_dir), "--port", str(port)]
        return module + where + options


PEERS = (
    Peer("fourstep", "Fourstep", PATH, "/readyz"),
    Peer("ray_serve", "Ray Serve, @serve.batch", "/", "/"),
    Peer("lit_serve", "LitServe", "/predict", "/health", own_python=True),
    Peer(
        "bento_ml", "BentoML", "/generate", "/readyz",
        body=lambda ask: {"asks": [ask.body()]}, own_python=True,
    ),
    Peer("fastapi_diffusers", "FastAPI + diffusers", "/generate", "/ready", takes_engine=False),
)  # fmt: skip
BY_NAME = {peer.name: peer for peer in PEERS}
