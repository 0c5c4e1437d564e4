"""The application of one replica, as most tests of the API ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app


@pytest.fixture(scope="module")
def http(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[TestClient]:
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    with TestClient(build_app(Replica(load_settings(values)))) as client:
        yield client
