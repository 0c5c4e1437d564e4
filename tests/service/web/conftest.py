"""The application of one replica, as most tests of the API ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from filelock import FileLock

from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from tests.service.web.gate import Gate, gated


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    """Before every service that asks for it."""
    with gated() as gate:
        yield gate


@pytest.fixture(scope="module")
def http(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[TestClient]:
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    with TestClient(build_app(Replica(load_settings(values)))) as client:
        yield client


@pytest.fixture(scope="session")
def clip_checkpoint(shared: Path) -> Path:
    """It draws clips of 8 frames, 64 px, and at most that many."""
    from tests.engines.checkpoints import (
        make_animatediff_checkpoint,
        make_checkpoint,
        make_motion_adapter,
    )

    with FileLock(shared / "tiny-clips.lock"):
        folder = shared / "models" / "tiny-clips"
        if not folder.exists():
            base = make_checkpoint(shared / "clips-base", lcm=False)
            adapter = make_motion_adapter(shared / "clips-motion")
            make_animatediff_checkpoint(folder, base, adapter)
        return folder
