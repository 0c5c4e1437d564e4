"""Jobs in a folder: what one replica writes every other reads, whatever becomes of the first."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from service.settings import MIB
from service.web.videos import store as module
from service.web.videos.store import LOST_S, ORPHAN_S, VideoStore

JOB = {"status": "queued", "progress": 0, "created_at": 0, "error": None, "expires_at": None}
DONE = {"status": "completed", "progress": 100, "completed_at": 7, "suffix": "mp4"}
HOUR_S = 3600.0


class Later:
    """A clock that can be put forward."""

    seconds = 0.0

    def __call__(self) -> float:
        return time.time() + self.seconds


def replica(folder: Path, **options: Any) -> VideoStore:
    return VideoStore(folder, **({"life_s": HOUR_S, "max_bytes": MIB} | options))


def create(store: VideoStore, key: str = "alice") -> str:
    return store.create(JOB, key, time.time() + HOUR_S)


def finish(store: VideoStore, video_id: str, clip: bytes = b"clip", key: str = "alice") -> bool:
    return store.finish(video_id, key, DONE, clip, "mp4", b"thumbnail")


def on_disk(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_replica_tells_of_a_job_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "below" / "videos"
    one, other = replica(folder), replica(folder)
    video_id = create(one)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for store in (one, other, replica(folder)):
        video = store.read(video_id, "alice")
        assert video is not None
        assert (video["id"], video["status"], video["progress"]) == (video_id, "queued", 0)
    one.beat({video_id: {"status": "in_progress", "progress": 40}})
    video = other.read(video_id, "alice")
    assert video is not None
    assert (video["status"], video["progress"]) == ("in_progress", 40)
    assert other.content(video_id, "alice", thumbnail=False) is None
    assert finish(one, video_id)
    one.beat({})
    video = other.read(video_id, "alice")
    assert video is not None
    assert (video["status"], video["completed_at"]) == ("completed", 7)
    assert abs(video["expires_at"] - time.time() - HOUR_S) < 60
    assert "suffix" not in video
    for thumbnail, data, media_type in (
        (False, b"clip", "video/mp4"),
        (True, b"thumbnail", "image/webp"),
    ):
        found = other.content(video_id, "alice", thumbnail=thumbnail)
        assert found is not None
        assert (found.path.read_bytes(), found.media_type) == (data, media_type)


def test_another_key_finds_nothing(tmp_path: Path) -> None:
    store = replica(tmp_path)
    video_id = create(store)
    finish(store, video_id)
    assert store.read(video_id, "bob") is None
    assert store.all_of("bob") == []
    assert store.content(video_id, "bob", thumbnail=False) is None
    assert not store.remove(video_id, "bob")
    assert [video["id"] for video in store.all_of("alice")] == [video_id]


@pytest.mark.parametrize("video_id", ["", "..", "video_x", "../" * 12, f"video_{'a' * 32}"])
def test_what_is_no_id_is_no_path(tmp_path: Path, video_id: str) -> None:
    store = replica(tmp_path)
    assert store.read(video_id, "alice") is None
    assert store.content(video_id, "alice", thumbnail=False) is None
    assert not store.remove(video_id, "alice")
    assert not store.exists(video_id, "alice")


def test_a_job_whose_replica_is_silent_is_lost_for_good(tmp_path: Path) -> None:
    later = Later()
    dead, one, other = replica(tmp_path), *(replica(tmp_path, clock=later) for _ in range(2))
    video_id = create(dead)
    dead.beat({video_id: {"status": "in_progress", "progress": 40}})
    later.seconds = LOST_S - 1
    video = one.read(video_id, "alice")
    assert video is not None
    assert video["status"] == "in_progress"
    later.seconds = LOST_S + 1
    for store in (one, other):
        video = store.read(video_id, "alice")
        assert video is not None
        assert (video["status"], video["error"]["code"]) == ("failed", "job_lost")
        assert "create the video again" in video["error"]["message"]
    assert not finish(dead, video_id)  # it had been stopped, not killed
    video = other.read(video_id, "alice")
    assert video is not None
    assert video["status"] == "failed"
    assert other.content(video_id, "alice", thumbnail=False) is None


def test_a_replica_that_beats_keeps_its_jobs_and_no_others(tmp_path: Path) -> None:
    later = Later()
    store, other = replica(tmp_path, clock=later), replica(tmp_path, clock=later)
    drawn, forgotten = create(store), create(store)
    later.seconds = 10 * LOST_S
    store.beat({drawn: {"status": "in_progress", "progress": 1}})
    statuses = {video["id"]: video["status"] for video in other.all_of("alice")}
    assert statuses == {drawn: "in_progress", forgotten: "failed"}


def test_a_deleted_job_stays_so_whatever_is_still_written(tmp_path: Path) -> None:
    drawing, other = replica(tmp_path), replica(tmp_path)
    video_id = create(drawing)
    assert drawing.exists(video_id, "alice")
    assert other.remove(video_id, "alice")
    assert not drawing.exists(video_id, "alice")
    assert not finish(drawing, video_id)
    assert other.read(video_id, "alice") is None
    assert on_disk(tmp_path) == set()
    assert not other.remove(video_id, "alice")


def test_of_two_ends_the_first_counts(tmp_path: Path) -> None:
    stores = [replica(tmp_path) for _ in range(8)]
    video_id = create(stores[0])
    ready, told = threading.Barrier(8), []

    def end(index: int) -> None:
        ready.wait()
        if stores[index].end(video_id, "alice", {"status": "failed", "error": {"code": index}}):
            told.append(index)

    threads = [threading.Thread(target=end, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    video = stores[0].read(video_id, "alice")
    assert video is not None
    assert told == [video["error"]["code"]]


def test_without_links_an_end_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("this file system has none")

    monkeypatch.setattr(os, "link", refuse)
    store = replica(tmp_path)
    video_id = create(store)
    assert finish(store, video_id)
    assert not store.end(video_id, "alice", {"status": "failed"})
    video = store.read(video_id, "alice")
    assert video is not None
    assert video["status"] == "completed"


def test_what_is_expired_or_without_a_job_is_swept_and_foreign_files_stay(tmp_path: Path) -> None:
    later = Later()
    store = replica(tmp_path, clock=later)
    old = create(store)
    finish(store, old)
    orphans = [f"video_{'a' * 32}.mp4", f"video_{'b' * 32}.end", f"{'c' * 32}.beat"]
    orphans.append(f"video_{'d' * 32}.mp4.{'0' * 8}.part")
    foreign = ["notes.txt", "video_x.mp4", "x.job"]
    for name in (*orphans, *foreign):
        (tmp_path / name).write_bytes(b"x")
    store.sweep()
    assert set(orphans) <= on_disk(tmp_path)  # they may be in the making
    later.seconds = ORPHAN_S + 1
    assert store.sweep() == (1, sum(path.stat().st_size for path in tmp_path.glob(f"{old}*")))
    assert not set(orphans) & on_disk(tmp_path)
    later.seconds = HOUR_S + 1
    assert store.read(old, "alice") is None
    assert store.content(old, "alice", thumbnail=False) is None
    assert store.sweep() == (0, 0)
    assert on_disk(tmp_path) == set(foreign)


def test_an_open_job_is_kept_until_nobody_can_draw_it_any_more(tmp_path: Path) -> None:
    later = Later()
    store = replica(tmp_path, clock=later)
    create(store)
    later.seconds = 2 * HOUR_S - 60  # until its deadline, and the life of a job after that
    assert store.sweep()[0] == 1
    later.seconds = 2 * HOUR_S + 60
    assert store.sweep() == (0, 0)


def test_the_next_to_expire_go_first_and_open_jobs_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = replica(tmp_path)
    opened = create(store)
    ids = []
    for _ in range(12):
        ids.append(create(store))
        finish(store, ids[-1], b"x" * (MIB // 8))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < MIB + 10_000
    kept = [video["id"] for video in store.all_of("alice")]
    assert opened in kept
    assert [each for each in ids if each in kept] == ids[-(len(kept) - 1) :]
    assert len(kept) > 6
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    store.sweep()
    assert {video["id"] for video in store.all_of("alice")} == {opened, *ids[-2:]}


def test_what_cannot_be_kept_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = replica(tmp_path)
    video_id = create(store)
    with pytest.raises(OSError, match="video_files_bytes"):
        finish(store, video_id, b"x" * (MIB + 1))
    before = on_disk(tmp_path)

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for write in (
        lambda: create(store),
        lambda: finish(store, video_id),
        lambda: store.beat({"x": {}}),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert on_disk(tmp_path) == before


def test_jobs_come_in_the_order_in_which_they_were_created(tmp_path: Path) -> None:
    store = replica(tmp_path)
    ids = [create(store) for _ in range(20)]  # within the same second, most likely
    assert [video["id"] for video in store.all_of("alice")] == ids
    assert len(set(ids)) == 20
