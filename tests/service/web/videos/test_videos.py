"""`/v1/videos` by OpenAI's own client, unchanged, and the clip itself by `Accept`."""

from __future__ import annotations

import io
import logging
import time
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.access.safety import Verdict
from tests.service.web.videos.conftest import client_of, headers_of, replica_client
from tests.service.web.videos.test_clips import read_mp4
from tests.waiting import wait_for

# OpenAI shut its own service down on 2026-09-24; the client still has the calls.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

VIDEOS = "/v1/videos"
SHORT = {"num_inference_steps": 2, "seed": 7}
LONG = {"num_inference_steps": 999, "sampler": "ddim", "size": "128x128"}


@pytest.fixture(scope="module")
def client(http: TestClient) -> openai.OpenAI:
    return client_of(http)


def metrics(http: TestClient) -> dict[str, float]:
    lines = [line for line in http.get("/metrics").text.splitlines() if line[0] != "#"]
    return {series: float(value) for series, value in (line.rsplit(" ", 1) for line in lines)}


def create(http: TestClient, name: str = "alice", **fields: Any) -> dict[str, Any]:
    answer = http.post(VIDEOS, json={"prompt": "a star"} | fields, headers=headers_of(name))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def read(http: TestClient, video: dict[str, Any], name: str = "alice") -> dict[str, Any]:
    return dict(http.get(f"{VIDEOS}/{video['id']}", headers=headers_of(name)).json())


def test_openais_client_creates_polls_downloads_lists_and_deletes(
    client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        video = client.videos.create_and_poll(
            prompt="a red star",
            model="tiny-clips",
            seconds="1",  # type: ignore[arg-type]  # OpenAI has 4, 8 and 12
            size="64x72",  # type: ignore[arg-type]
            poll_interval_ms=20,
            extra_body=SHORT | {"fps": 4},
        )
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.object, video.model, video.prompt) == ("video", "tiny-clips", "a red star")
    assert (video.seconds, video.size) == ("1", "64x72")
    assert video.completed_at is not None
    assert video.created_at <= video.completed_at <= time.time()
    assert video.expires_at is not None
    assert 3590 < video.expires_at - video.completed_at < 3610
    told = video.model_dump()
    assert (told["num_frames"], told["fps"], told["seed"]) == (4, 4, 7)
    assert (told["num_inference_steps"], told["warnings"]) == (2, [])
    assert told["timings"]["denoise_ms"] > 0

    content = client.videos.download_content(video.id)
    assert content.response.headers["content-type"] == "video/mp4"
    assert content.response.headers["cache-control"] == "no-store"
    frames, rate, _ = read_mp4(content.content)
    assert frames.shape == (4, 72, 64, 3)
    assert rate == 4
    part = client.videos.with_raw_response.download_content(
        video.id, extra_headers={"range": "bytes=4-7"}
    )
    assert (part.http_response.status_code, part.content) == (206, b"ftyp")
    picture = client.videos.download_content(video.id, variant="thumbnail")
    assert Image.open(io.BytesIO(picture.content)).size == (64, 72)
    with pytest.raises(openai.BadRequestError, match="there are 'video' and 'thumbnail'"):
        client.videos.download_content(video.id, variant="spritesheet")

    others = [client.videos.create(prompt="x", extra_body=SHORT).id for _ in range(4)]
    ids = [video.id, *others]
    assert [each.id for each in client.videos.list()] == ids[::-1]  # the newest first
    assert [each.id for each in client.videos.list(order="asc", limit=2)] == ids  # three pages
    page = client.videos.list(order="asc", limit=2, after=ids[0])
    assert ([each.id for each in page.data], page.has_more) == (ids[1:3], True)
    with pytest.raises(openai.BadRequestError, match="none of your videos"):
        client.videos.list(after="video_unknown")

    for each in ids:
        gone = client.videos.delete(each)
        assert (gone.id, gone.object, gone.deleted) == (each, "video.deleted", True)
        for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
            with pytest.raises(openai.NotFoundError, match="unknown, expired or deleted"):
                call(each)
    assert client.videos.list().data == []
    assert "a red star" not in str([vars(record) for record in caplog.records])


def test_the_same_seed_is_the_same_clip_whichever_way(
    http: TestClient, client: openai.OpenAI
) -> None:
    asked = {"prompt": "a moon"} | SHORT
    form = client.videos.create_and_poll(prompt="a moon", extra_body=SHORT, poll_interval_ms=20)
    kept = client.videos.download_content(form.id).content
    accept = headers_of(accept="video/mp4")
    answer = http.post(VIDEOS, json=asked, headers=accept)
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["x-fourstep-seed"] == "7"
    assert "denoise;dur=" in answer.headers["server-timing"]
    assert answer.content == kept
    slow = http.post(VIDEOS, json=asked | {"fps": 2}, headers=accept).content
    frames, rate, _ = read_mp4(slow)
    assert rate == 2
    # What is drawn does not depend on it; how much x264 saves does.
    assert np.abs(frames.astype(int) - read_mp4(kept)[0]).mean() < 6


@pytest.mark.parametrize("name", ["webp", "gif"])
def test_an_animated_image_at_once(http: TestClient, name: str) -> None:
    headers = headers_of(accept=f"text/html, image/{name};q=0.9")
    body = {"prompt": "a star", "num_frames": 3, "fps": 5} | SHORT
    answer = http.post(VIDEOS, json=body, headers=headers)
    assert answer.headers["content-type"] == f"image/{name}"
    image = Image.open(io.BytesIO(answer.content))
    image.load()
    assert (image.format, image.size) == (name.upper(), (64, 64))
    assert (image.n_frames, image.info["duration"]) == (3, 200)  # type: ignore[attr-defined]
    job = create(http, output_format=name, num_frames=3, fps=5, **SHORT)
    wait_for(lambda: read(http, job)["status"] == "completed", "it is drawn")
    kept = http.get(f"{VIDEOS}/{job['id']}/content", headers=headers_of())
    assert (kept.headers["content-type"], kept.content) == (f"image/{name}", answer.content)


def test_a_model_of_clips_draws_pictures_too(http: TestClient) -> None:
    accept = headers_of(accept="image/png")
    asked = {"prompt": "a star"} | SHORT
    answer = http.post("/v1/images/generations", json=asked, headers=accept)
    assert answer.status_code == 200, answer.text
    picture = Image.open(io.BytesIO(answer.content))
    assert (picture.format, picture.size) == ("PNG", (64, 64))
    accept = headers_of(accept="image/webp")
    one = http.post(
        VIDEOS, json=asked | {"num_frames": 1, "output_compression": 100}, headers=accept
    )
    frame = np.asarray(Image.open(io.BytesIO(one.content)).convert("RGB")).astype(int)
    assert np.abs(frame - np.asarray(picture)).mean() < 12  # noise, and WebP is lossy


def test_a_deleted_job_leaves_at_its_next_step(http: TestClient) -> None:
    before = metrics(http)
    video = create(http, **LONG)
    assert (video["status"], video["progress"]) == ("queued", 0)
    wait_for(lambda: read(http, video)["progress"] >= 1, "it is drawn")
    shown = read(http, video)
    assert (shown["status"], shown["completed_at"]) == ("in_progress", None)
    early = http.get(f"{VIDEOS}/{video['id']}/content", headers=headers_of())
    assert (early.status_code, early.json()["error"]["code"]) == (400, "video_not_ready")
    assert metrics(http)['fourstep_open_videos{model="tiny-clips"}'] == 1
    assert http.delete(f"{VIDEOS}/{video['id']}", headers=headers_of()).status_code == 200
    running = 'fourstep_running_rows{model="tiny-clips"}'
    wait_for(lambda: metrics(http)[running] == 0, "its row has left")
    deleted = 'fourstep_videos_total{model="tiny-clips",status="deleted"}'
    wait_for(lambda: metrics(http)[deleted] == before[deleted] + 1, "it is counted")
    assert metrics(http)['fourstep_open_videos{model="tiny-clips"}'] == 0


def test_keys_have_their_own(http: TestClient) -> None:
    video = create(http, "alice", **SHORT)
    wait_for(lambda: read(http, video)["status"] == "completed", "it is drawn")
    path = f"{VIDEOS}/{video['id']}"
    for method, each in (("GET", path), ("GET", f"{path}/content"), ("DELETE", path)):
        assert http.request(method, each, headers=headers_of("bob")).status_code == 404
        assert http.request(method, each).status_code == 401
    assert http.get(VIDEOS, headers=headers_of("bob")).json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    assert http.get(f"{path}/content", headers=headers_of()).status_code == 200


def test_a_job_that_fails_says_why(http: TestClient) -> None:
    headers = headers_of(**{"x-request-timeout": "0.5"})
    video = http.post(VIDEOS, json={"prompt": "x"} | LONG, headers=headers).json()
    wait_for(lambda: read(http, video)["status"] == "failed", "its deadline has passed")
    error = read(http, video)["error"]
    assert (error["code"], error["type"]) == ("deadline_exceeded", "timeout_error")
    answer = http.get(f"{VIDEOS}/{video['id']}/content", headers=headers_of())
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "video_failed")
    assert "not finished by its deadline" in answer.json()["error"]["message"]


def test_clips_are_counted(http: TestClient) -> None:
    before = metrics(http)
    body = {"prompt": "x", "num_frames": 4} | SHORT
    http.post(VIDEOS, json=body, headers=headers_of(accept="video/mp4"))
    video = create(http, num_frames=4, **SHORT)
    wait_for(lambda: read(http, video)["status"] == "completed", "it is drawn")
    completed = 'fourstep_videos_total{model="tiny-clips",status="completed"}'
    wait_for(lambda: metrics(http)[completed] > before[completed], "it is counted")
    after = metrics(http)
    of_model = '{model="tiny-clips"}'
    for series, expected in {
        f"fourstep_clips_total{of_model}": 2,
        f"fourstep_clip_frames_total{of_model}": 8,
        f"fourstep_clip_seconds_total{of_model}": 1,
        f"fourstep_clip_encode_seconds_count{of_model}": 2,
        f"fourstep_video_seconds_count{of_model}": 1,
        completed: 1,
        'fourstep_requests_total{endpoint="videos",model="tiny-clips",status="200"}': 2,
        f"fourstep_images_total{of_model}": 0,
    }.items():
        assert after[series] - before[series] == expected, series


class Sees:
    """A safety filter that lets so many pictures pass, and no more."""

    num_left = 0

    def check_prompt(self, text: str) -> Verdict:
        return Verdict("gore" not in text, "it asks for gore")

    def check_images(self, pixels: np.ndarray) -> list[Verdict]:
        assert pixels.shape[1:] == (64, 64, 3)
        self.num_left -= len(pixels)
        return [Verdict(index + self.num_left >= 0) for index in range(len(pixels))]


SEES = Sees()


def test_a_safety_filter_sees_every_frame(clip_settings: dict[str, Any]) -> None:
    values = clip_settings | {"safety": f"{__name__}:SEES"}
    with replica_client(values) as http:
        refused = http.post(VIDEOS, json={"prompt": "gore"}, headers=headers_of())
        assert refused.json()["error"]["code"] == "content_policy_violation"
        for num_seen, status in ((8, "completed"), (7, "failed")):
            SEES.num_left = num_seen
            video = create(http, **SHORT)
            wait_for(
                lambda video=video: read(http, video)["completed_at"] or read(http, video)["error"],
                "it is over",
            )
            shown = read(http, video)
            assert shown["status"] == status
        assert shown["error"]["code"] == "content_policy_violation"
        SEES.num_left = 7
        headers = headers_of(accept="video/mp4")
        answer = http.post(VIDEOS, json={"prompt": "x"} | SHORT, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (
            400, "content_policy_violation",
        )  # fmt: skip


# -- what becomes of jobs where replicas come and go -----------------------------------------------


@pytest.fixture
def settings(clip_settings: dict[str, Any], tmp_path: Any) -> dict[str, Any]:
    return clip_settings | {"video_files_dir": tmp_path / "videos"}


def test_two_replicas_of_one_folder_and_the_end_of_one(settings: dict[str, Any]) -> None:
    with replica_client(settings) as one:
        with replica_client(settings | {"drain_s": 0}) as other:
            done = create(other, **SHORT)
            wait_for(lambda: read(one, done)["status"] == "completed", "it is drawn")
            kept = one.get(f"{VIDEOS}/{done['id']}/content", headers=headers_of())
            assert read_mp4(kept.content)[0].shape == (8, 64, 64, 3)
            drawn = create(other, **LONG)
            wait_for(lambda: read(one, drawn)["progress"] >= 1, "its progress is told of")
            assert one.delete(f"{VIDEOS}/{drawn['id']}", headers=headers_of()).status_code == 200
            running = 'fourstep_running_rows{model="tiny-clips"}'
            wait_for(lambda: metrics(other)[running] == 0, "its row has left the other")
            late = create(other, **LONG)
        left = read(one, late)
        assert (left["status"], left["error"]["code"]) == ("failed", "job_lost")
        assert "was shut down before it was done" in left["error"]["message"]
        assert read(one, done)["status"] == "completed"
    with replica_client(settings) as successor:
        assert read(successor, done)["status"] == "completed"


def test_accepted_jobs_end_before_the_replica_does(settings: dict[str, Any]) -> None:
    with replica_client(settings) as http:
        video = create(http, num_inference_steps=20)
    with replica_client(settings) as http:
        assert read(http, video)["status"] == "completed"
