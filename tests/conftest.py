"""Fixtures that several test packages share: a tiny checkpoint and the bundle cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def lcm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LCM with a guidance embedding, 64 px."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny-lcm", lcm=True)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's bundles are built, once."""
    return tmp_path_factory.mktemp("cache")
