"""Jobs and their clips as files, in a folder that replicas share: any of them answers for a job
that another accepted, and says so where that other is gone.

    {id}.{owner's key}.job    what was accepted; written once, by the replica that draws it
    {id}.mp4 .webp .gif       the clip, and {id}.thumbnail, its picture
    {id}.end                  how it ended; written once, the first to write it is right
    {replica}.beat            that a replica with open jobs is alive, and how far they are

Nothing is ever written twice but a beat, which is replaced as a whole: no reader sees half a file,
and a job that was deleted stays so, whatever is still written of it. Who deletes takes the ``.job``
away first, and what is left without one is swept. The time of change of ``.job`` and ``.end`` is
when they expire, as in `service.web.image_files`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from service.web.videos.clips import CLIP_MEDIA_TYPES

logger = logging.getLogger("fourstep.videos")

Object = dict[str, Any]

NUM_SECRET_BYTES = 24
ID = re.compile(r"video_[A-Za-z0-9_-]{32}")
FILE = re.compile(
    rf"(?P<id>{ID.pattern})\.(?P<kind>[0-9a-f]{{16}}\.job|end|thumbnail|"
    rf"{'|'.join(CLIP_MEDIA_TYPES)})|[0-9a-f]{{32}}\.beat"
)
UNFINISHED = ".part"
MAX_KEPT = 1000  # jobs that are over; the next to expire goes first. Listing reads their files.
BEAT_S = 1.0
# Replicas on several machines go by clocks that NTP holds together within a second, and a network
# file system shows a file that much later.
LOST_S = 15.0
ORPHAN_S = 60.0  # no write takes as long
LOST: Object = {
    "code": "job_lost",
    "message": "the replica that drew this is gone; create the video again",
    "type": "server_error",
    "param": None,
}


@dataclass(frozen=True, slots=True)
class Content:
    """A file of a finished job."""

    path: Path
    media_type: str
    left_s: float


class VideoStore:
    """The folder as one replica sees it. All methods block, and may be called from any thread.

    ``max_bytes`` bounds the clips; what would not fit alone is refused. ``clock`` is Unix time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        life_s: float,
        max_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.replica = secrets.token_hex(16)
        self._folder = folder
        self._life_s = life_s
        self._max_bytes = max_bytes
        self._clock = clock

    # -- the replica that draws ---------------------------------------------------------------

    def create(self, job: Object, key: str, give_up_at: float) -> str:
        """The id of a new job of this API key's; ``job`` is an answer without it.

        Raises:
            OSError: the folder cannot be written.
        """
        video_id = f"video_{secrets.token_urlsafe(NUM_SECRET_BYTES)}"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = {"replica": self.replica, "written_at": self._clock(), "video": job}
        path = self._job(video_id, key)
        self._write(path, orjson.dumps(written), expires=give_up_at + self._life_s)
        return video_id

    def finish(
        self, video_id: str, key: str, end: Object, clip: bytes, suffix: str, thumbnail: bytes
    ) -> bool:
        """Keep the clip of a job. False where it was deleted meanwhile, or is given up for lost.

        Raises:
            OSError: it cannot be kept: no room for it, or the folder cannot be written.
        """
        size = len(clip) + len(thumbnail)
        if size > self._max_bytes:
            raise OSError(f"a clip of {size} bytes, and video_files_bytes is {self._max_bytes}")
        self.sweep(room_bytes=size)
        self._write(self._folder / f"{video_id}.{suffix}", clip)
        self._write(self._folder / f"{video_id}.thumbnail", thumbnail)
        return self.end(video_id, key, end)

    def end(self, video_id: str, key: str, end: Object) -> bool:
        """Write how a job ended; a second time has no effect. False: it is not what was told."""
        expires = self._clock() + self._life_s
        end = end | {"expires_at": int(expires)}
        path = self._folder / f"{video_id}.end"
        is_first = self._write(path, orjson.dumps(end), expires=expires, once=True)
        if not self._job(video_id, key).exists():
            self._remove_files(video_id)
            return False
        return is_first

    def beat(self, progress: Mapping[str, Object]) -> None:
        """Say that this replica is alive, and what is new of its open jobs; without any, be silent.

        Raises:
            OSError: the folder cannot be written.
        """
        path = self._folder / f"{self.replica}.beat"
        if progress:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(path, orjson.dumps({"at": self._clock(), "jobs": progress}))
        else:
            path.unlink(missing_ok=True)

    # -- any replica --------------------------------------------------------------------------

    def exists(self, video_id: str, key: str) -> bool:
        return bool(ID.fullmatch(video_id)) and self._job(video_id, key).exists()

    def read(self, video_id: str, key: str) -> Object | None:
        """The job as an answer tells it; None where this key has none of that id."""
        found = self._read(video_id, key)
        return None if found is None else found[1]

    def all_of(self, key: str) -> list[Object]:
        """This key's jobs, the oldest first."""
        suffix = self._job("", key).name
        ids = [name.removesuffix(suffix) for name in self._names() if name.endswith(suffix)]
        found = [each for video_id in ids if (each := self._read(video_id, key)) is not None]
        return [video for _, video in sorted(found, key=lambda each: (each[0], each[1]["id"]))]

    def _read(self, video_id: str, key: str) -> tuple[float, Object] | None:
        """When it was written, and what is told of it."""
        if not ID.fullmatch(video_id):
            return None
        path = self._job(video_id, key)
        written = self._load(path)
        if written is None:
            return None
        expires = self._expires(path)
        video: Object = written["video"] | {"id": video_id}
        end = self._end(video_id) or self._end_if_lost(video_id, key, written)
        if end is not None:
            expires = self._expires(self._folder / f"{video_id}.end")
            video |= {name: each for name, each in end.items() if name != "suffix"}
        else:
            beat = self._load(self._folder / f"{written['replica']}.beat") or {}
            video |= beat.get("jobs", {}).get(video_id, {})
        return (written["written_at"], video) if expires > self._clock() else None

    def content(self, video_id: str, key: str, *, thumbnail: bool) -> Content | None:
        """Where the clip of a finished job is, or its picture."""
        end = self._end(video_id) if self.exists(video_id, key) else None
        if end is None or "suffix" not in end:
            return None
        name = f"{video_id}.thumbnail" if thumbnail else f"{video_id}.{end['suffix']}"
        media_type = "image/webp" if thumbnail else CLIP_MEDIA_TYPES[end["suffix"]]
        left_s = self._expires(self._folder / f"{video_id}.end") - self._clock()
        path = self._folder / name
        return Content(path, media_type, left_s) if left_s > 0 and path.exists() else None

    def remove(self, video_id: str, key: str) -> bool:
        """Whether there was such a job; there is none any more."""
        if not ID.fullmatch(video_id):
            return False
        try:
            self._job(video_id, key).unlink()
        except FileNotFoundError:
            return False
        self._remove_files(video_id)
        return True

    def sweep(self, room_bytes: int = 0) -> tuple[int, int]:
        """Remove what is expired, or belongs to no job; then of what is over whatever expires next,
        until it is `MAX_KEPT` and ``room_bytes`` more fit in. Number and bytes of what is left.
        """
        now = self._clock()
        files: dict[str, list[tuple[Path, os.stat_result]]] = defaultdict(list)
        for path, stat in self._files():
            match = FILE.fullmatch(path.name)
            if match is None or match["id"] is None:  # unfinished, or a beat
                if now - stat.st_mtime > ORPHAN_S:
                    path.unlink(missing_ok=True)
            else:
                files[match["id"]].append((path, stat))
        over, num_bytes, num_jobs = [], 0, 0
        for video_id, group in files.items():
            kinds = {path.suffix: stat for path, stat in group}
            size = sum(stat.st_size for _, stat in group)
            known = kinds.get(".end") or kinds.get(".job")
            if ".job" not in kinds or known is None:
                gone = all(now - stat.st_mtime > ORPHAN_S for _, stat in group)
            else:
                gone = known.st_mtime < now
            if gone:
                self._remove_all(path for path, _ in group)
                continue
            num_bytes += size
            num_jobs += ".job" in kinds
            if ".end" in kinds and ".job" in kinds:
                over.append((kinds[".end"].st_mtime_ns, video_id, size))
        over.sort(reverse=True)
        while over and (num_bytes + room_bytes > self._max_bytes or len(over) > MAX_KEPT):
            _, video_id, size = over.pop()
            self._remove_all(path for path, _ in files[video_id])
            num_bytes -= size
            num_jobs -= 1
        return num_jobs, num_bytes

    # -- files --------------------------------------------------------------------------------

    def _job(self, video_id: str, key: str) -> Path:
        """A job's file has its owner in its name: another key's question finds no file."""
        owner = hashlib.sha256(key.encode()).hexdigest()[:16]
        return self._folder / f"{video_id}.{owner}.job"

    def _end(self, video_id: str) -> Object | None:
        return self._load(self._folder / f"{video_id}.end")

    def _end_if_lost(self, video_id: str, key: str, written: Object) -> Object | None:
        """The end of a job whose replica has been silent for too long, or knows nothing of it."""
        now = self._clock()
        beat = self._load(self._folder / f"{written['replica']}.beat") or {"at": 0, "jobs": {}}
        age_s = now - written["written_at"]
        if age_s < LOST_S or (video_id in beat["jobs"] and now - beat["at"] < LOST_S):
            return self._end(video_id)  # it may have ended since this was asked
        if (end := self._end(video_id)) is not None:
            return end
        lost = {"status": "failed", "error": LOST, "completed_at": None, "timings": None}
        if self.end(video_id, key, lost):
            logger.warning("%s is lost: its replica has not been heard of", video_id)
        return self._end(video_id)

    def _write(
        self, path: Path, data: bytes, *, expires: float | None = None, once: bool = False
    ) -> bool:
        """All of a file or nothing; with ``once`` only where there is none, which is told."""
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
        try:
            unfinished.write_bytes(data)
            if expires is not None:
                os.utime(unfinished, (expires, expires))
            if not once:
                unfinished.replace(path)
                return True
            try:
                os.link(unfinished, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                if path.exists():
                    return False
                unfinished.replace(path)
            return True
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    @staticmethod
    def _load(path: Path) -> Object | None:
        try:
            loaded: Object = orjson.loads(path.read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return None
        return loaded

    @staticmethod
    def _expires(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _remove_files(self, video_id: str) -> None:
        suffixes = ("thumbnail", *CLIP_MEDIA_TYPES, "end")
        self._remove_all(self._folder / f"{video_id}.{suffix}" for suffix in suffixes)

    @staticmethod
    def _remove_all(paths: Iterator[Path]) -> None:
        """A job's own file first: from then on it is gone."""
        for path in sorted(paths, key=lambda path: path.suffix != ".job"):
            path.unlink(missing_ok=True)

    def _names(self) -> list[str]:
        return [path.name for path, _ in self._files()]

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Those of ours."""
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    name = re.sub(rf"\.[0-9a-f]{{8}}\{UNFINISHED}$", "", entry.name)
                    if FILE.fullmatch(name):
                        try:
                            yield Path(entry.path), entry.stat(follow_symlinks=False)
                        except FileNotFoundError:  # another replica swept it
                            continue
        except FileNotFoundError:  # nothing was kept yet
            return
