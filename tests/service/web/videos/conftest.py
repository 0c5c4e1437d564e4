"""A service over a tiny random AnimateDiff checkpoint, by torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from service.access.keys import make_key
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app

KEYS = {name: make_key(name) for name in ("alice", "bob")}


@pytest.fixture(scope="session")
def clip_settings(
    clip_checkpoint: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Of a service with two keys, which draws for long where asked to."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(line for _, line in KEYS.values()))
    return {
        "model": str(clip_checkpoint),
        "engine": "torch",
        "cache_dir": cache_dir,
        "api_keys_file": keys,
        "max_steps": 1000,
        "request_timeout_s": 3600,  # a busy machine would call a long one hopeless
        "video_timeout_s": 3600,
        "video_files_dir": tmp_path_factory.mktemp("videos"),
        "drain_s": 60,
    }


def replica_client(settings: dict[str, Any]) -> TestClient:
    return TestClient(build_app(Replica(load_settings(settings))))


@pytest.fixture(scope="module")
def http(clip_settings: dict[str, Any]) -> Iterator[TestClient]:
    with replica_client(clip_settings) as opened:
        yield opened


def client_of(http: TestClient, name: str = "alice") -> openai.OpenAI:
    """OpenAI's own, with that key."""
    return openai.OpenAI(
        api_key=KEYS[name][0], base_url=f"{http.base_url}/v1", http_client=http, max_retries=0
    )


def headers_of(name: str = "alice", **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name][0]}"} | more
