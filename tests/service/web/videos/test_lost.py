"""A replica in a process of its own: a client that leaves, and a kill in the middle of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from service.web.videos import store as module
from tests.replicas import leave_when, replica_process, wait_until_ready
from tests.service.web.videos.conftest import headers_of, replica_client
from tests.service.web.videos.test_videos import LONG, VIDEOS, read
from tests.waiting import wait_for


def test_a_killed_replicas_jobs_are_said_to_be_lost(
    clip_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = clip_settings | {"video_files_dir": tmp_path / "videos"}
    with replica_process(tmp_path, **settings) as other, replica_client(settings) as http:
        wait_until_ready(other)
        running = 'fourstep_running_rows{model="tiny-clips"}'
        left = 'fourstep_requests_total{endpoint="videos",model="tiny-clips",status="499"}'
        body = {"prompt": "x"} | LONG

        headers = headers_of(accept="video/mp4")
        leave_when(other.url + VIDEOS, body, headers, lambda: other.metrics()[running] == 1)
        wait_for(lambda: other.metrics()[running] == 0, "its row is freed")
        assert other.metrics()[left] == 1

        video = httpx.post(other.url + VIDEOS, json=body, headers=headers_of(), timeout=60).json()
        wait_for(lambda: read(http, video)["progress"] >= 1, "it is drawn")
        other.process.kill()
        other.process.wait()
        monkeypatch.setattr(module, "LOST_S", 3.0)  # seen from here
        wait_for(lambda: read(http, video)["status"] == "failed", "its beat has stopped")
        error = read(http, video)["error"]
        assert error["code"] == "job_lost"
        assert "the replica that drew this is gone" in error["message"]
        assert http.delete(f"{VIDEOS}/{video['id']}", headers=headers_of()).status_code == 200
