"""What a family is tested with: of a module's `checkpoint`, its runner and diffusers' pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.drawing.runner import Runner
from tests.engines.peers import Peer, open_runner


@pytest.fixture(scope="module")
def backend() -> str:
    """A module that tests others too has a fixture of its own."""
    return "torch"


@pytest.fixture(scope="module")
def runner(checkpoint: Path, backend: str, cache_dir: Path) -> Iterator[Runner]:
    opened = open_runner(checkpoint, backend, cache_dir)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> Peer:
    return Peer(checkpoint)
