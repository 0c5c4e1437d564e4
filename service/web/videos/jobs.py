"""The open jobs of this replica: they outlast the request that created them.

    accept ──▶ drawn as any other request ──▶ clip kept ──▶ end written
       └── every second: that this replica is alive, how far each is, whether one was deleted

However it ends, a job that was accepted gets an end, or is deleted. Where this process dies before
that, the other replicas and the next one see that its beat has stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from service.errors import Cancelled, NotReady, ServiceError
from service.replica import Replica
from service.web.videos.clip_job import ClipJob
from service.web.videos.store import BEAT_S, LOST, VideoStore

logger = logging.getLogger("fourstep.videos")

Object = dict[str, Any]
SWEEP_S = 60.0
GIVE_UP_S = 5.0  # to write that what was not done is lost; without that it is found so
SHUT_DOWN = LOST | {
    "message": "the replica that drew this was shut down before it was done; create the video again"
}
NOT_KEPT = {
    "code": "not_kept",
    "message": "the clip was drawn and could not be kept; the service's log says why",
    "type": "server_error",
    "param": None,
}


@dataclass(eq=False, slots=True)
class OpenJob:
    """One that is not over."""

    id: str
    key: str  # name of the API key that it is of
    job: ClipJob
    suffix: str
    began_at: float  # time.monotonic()

    @property
    def state(self) -> Object:
        running = self.job.is_running
        return {
            "status": "in_progress" if running else "queued",
            "progress": self.job.progress if running else 0,
        }


class VideoJobs:
    """Of one replica and its event loop. A thread of its own beats and sweeps."""

    def __init__(self, replica: Replica, store: VideoStore) -> None:
        self._replica = replica
        self._store = store
        self._open: dict[str, OpenJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._drain_began_at: float | None = None
        self._beats = False  # there is a beat of this replica's
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        replica.when_draining(self.drain)

    def start(self) -> None:
        """Beat from now on; no effect where that has begun."""
        if self._thread is None:
            self._closed.clear()
            self._thread = threading.Thread(
                target=self._beat_on, name="fourstep-videos", daemon=True
            )
            self._thread.start()

    def drain(self) -> None:
        """Accept no more. From any thread."""
        if self._drain_began_at is None:
            self._drain_began_at = time.monotonic()

    async def close(self) -> None:
        """Have what is open end, for ``drain_s`` from when draining began; then say that the rest
        is lost.
        """
        self.drain()
        assert self._drain_began_at is not None
        left_s = self._drain_began_at + self._replica.settings.drain_s - time.monotonic()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=max(0.0, left_s))
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=GIVE_UP_S)
        self._closed.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    # -- on the event loop --------------------------------------------------------------------

    async def accept(self, job: ClipJob, video: Object, key: str, give_up_at: float) -> str:
        """Queue a job and keep it as ``video``; its id. Nobody has to wait for it.

        ``give_up_at`` is its deadline in Unix time.

        Raises:
            NotReady: this replica is draining, or the job cannot be kept.
            ServiceError: there is no room for it. Nothing was accepted then.
        """
        if self._drain_began_at is not None:
            raise NotReady("this replica is shutting down; try again", retry_after_s=1)
        # A client that goes away now has its job all the same: it is half written.
        return await asyncio.shield(self._accept(job, video, key, give_up_at))

    async def _accept(self, job: ClipJob, video: Object, key: str, give_up_at: float) -> str:
        await job.__aenter__()
        try:
            video_id = await asyncio.to_thread(self._store.create, video, key, give_up_at)
        except OSError as error:
            await job.__aexit__(None, None, None)
            logger.error("no video can be kept in video_files_dir: %s", error)
            raise NotReady(
                "videos cannot be kept here now (the log says why); ask for the clip itself "
                "(Accept: video/mp4)",
                code="not_kept",
            ) from error
        opened = OpenJob(video_id, key, job, video["output_format"], time.monotonic())
        self._open[video_id] = opened
        self._replica.metrics.clips.open(len(self._open))
        task = asyncio.create_task(self._follow(opened))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return video_id

    def state_of(self, video_id: str) -> Object:
        """What is newer here than in the folder."""
        opened = self._open.get(video_id)
        return opened.state if opened is not None else {}

    def cancel(self, video_id: str) -> None:
        """Have its rows leave at the next step. Its files are gone already. From any thread."""
        opened = self._open.get(video_id)
        if opened is not None:
            self._replica.loop.cancel(opened.job.request)

    async def _follow(self, opened: OpenJob) -> None:
        status = "failed"
        try:
            status = await self._drawn(opened)
        except Exception:
            logger.exception("unforeseen error in %s", opened.id)
        finally:
            await opened.job.__aexit__(None, None, None)
            del self._open[opened.id]
            seconds = time.monotonic() - opened.began_at
            self._replica.metrics.clips.job(status, seconds)
            self._replica.metrics.clips.open(len(self._open))
            fields: Object = {"video": opened.id, "status": status, "key": opened.key}
            fields |= opened.job.request.timings.milliseconds()
            logger.info("video", extra={"fields": fields})

    async def _drawn(self, opened: OpenJob) -> str:
        """Its way to its end, which is written when this returns."""
        error: Object = SHUT_DOWN
        try:
            clip = await opened.job.clip()
            timings = opened.job.request.timings.milliseconds()
            end = {
                "status": "completed", "progress": 100, "completed_at": int(time.time()),
                "timings": timings, "suffix": opened.suffix,
            }  # fmt: skip
            thumbnail = opened.job.encoding.thumbnail
            kept = await asyncio.to_thread(
                self._store.finish, opened.id, opened.key, end, clip, opened.suffix, thumbnail
            )
            return "completed" if kept else "deleted"
        except Cancelled:
            return "deleted"
        except ServiceError as failure:
            error = failure.body()["error"]
        except OSError as failure:
            logger.error("%s is not kept in video_files_dir: %s", opened.id, failure)
            error = NOT_KEPT
        except asyncio.CancelledError:  # by close
            logger.warning("%s is given up: the replica is shut down", opened.id)
        return await asyncio.to_thread(self._fail, opened, error)

    def _fail(self, opened: OpenJob, error: Object) -> str:
        end = opened.state | {
            "status": "failed", "error": error, "completed_at": None,
            "timings": opened.job.request.timings.milliseconds(),
        }  # fmt: skip
        with contextlib.suppress(OSError):  # without an end it is found lost
            self._store.end(opened.id, opened.key, end)
        return "failed"

    # -- the thread ---------------------------------------------------------------------------

    def _beat_on(self) -> None:
        sweep_at, is_last = 0.0, False
        while not is_last:
            is_last = self._closed.wait(BEAT_S)
            try:
                self._beat()
                if time.monotonic() >= sweep_at:
                    sweep_at = time.monotonic() + SWEEP_S
                    self._replica.metrics.clips.kept(*self._store.sweep())
            except OSError as error:
                logger.error("video_files_dir cannot be used: %s", error)

    def _beat(self) -> None:
        opened = list(self._open.values())
        if opened or self._beats:
            self._store.beat({each.id: each.state for each in opened})
            self._beats = bool(opened)
        for each in opened:
            if not self._store.exists(each.id, each.key):  # deleted, by way of another replica
                self.cancel(each.id)
