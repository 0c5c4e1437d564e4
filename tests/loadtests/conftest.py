"""One real service for every command that is pointed at one: the product over a timing double."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests import serving
from loadtests.serving import Service


@pytest.fixture(scope="session")
def service(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[Service]:
    with serving.fourstep(str(lcm_checkpoint), cache_dir, gpu_shaped=True) as running:
        yield running
