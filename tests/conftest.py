"""Fixtures that several test packages share: tiny checkpoints, and a live app over each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.runner import Runner
from tests.engines.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def lcm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LCM with a guidance embedding, 64 px."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny-lcm", lcm=True)


@pytest.fixture(scope="session")
def sd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion, 64 px, guided by classifier-free guidance."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny-sd", lcm=False)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's bundles are built, once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", params=["torch", "onnxruntime"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def lcm_runner(lcm_checkpoint: Path, cache_dir: Path, backend: str) -> Iterator[Runner]:
    runner = Runner.open(str(lcm_checkpoint), backend=backend, cache_dir=cache_dir, max_batch=8)
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def sd_runner(sd_checkpoint: Path, cache_dir: Path, backend: str) -> Iterator[Runner]:
    runner = Runner.open(str(sd_checkpoint), backend=backend, cache_dir=cache_dir, max_batch=8)
    yield runner
    runner.close()
