"""Metrics of clips and their jobs: a part of `service.telemetry.metrics`, which makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.telemetry.metrics import Metrics

# A job: 0.5 s (a small clip on a GPU) to an hour.
JOB_SECONDS = (
    0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0,
)  # fmt: skip
ENCODE_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STATUSES = ("completed", "failed", "deleted")


class ClipMetrics:
    """Of one model. Thread-safe."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        jobs = metrics.counter(
            "fourstep_videos_total",
            "Jobs of clips that are over, by how they ended; deleted: while they were open.",
            "status",
        )
        self._jobs = {status: jobs.labels(model, status) for status in STATUSES}
        self._open = metrics.gauge("fourstep_open_videos", "Jobs that wait or are drawn.")
        self._job_seconds = metrics.histogram(
            "fourstep_video_seconds", "Jobs completed: from acceptance to the clip.", JOB_SECONDS
        ).labels(model)
        self._clips = metrics.counter(
            "fourstep_clips_total", "Clips made, for jobs and at once."
        ).labels(model)
        self._seconds = metrics.counter(
            "fourstep_clip_seconds_total", "How long the clips play that were made."
        ).labels(model)
        self._frames = metrics.counter(
            "fourstep_clip_frames_total", "Frames of the clips that were made."
        ).labels(model)
        self._encode = metrics.histogram(
            "fourstep_clip_encode_seconds", "One MP4, WebP or GIF.", ENCODE_SECONDS
        ).labels(model)
        # The replicas of a node share one folder: theirs is the same value, seen at other times.
        self._kept = metrics.gauge(
            "fourstep_video_files", "Jobs of clips that are kept.", "livemostrecent"
        )
        self._kept_bytes = metrics.gauge(
            "fourstep_video_files_bytes", "Bytes of the clips kept.", "livemostrecent"
        )

    def made(self, num_frames: int, seconds: float, encode_s: float) -> None:
        """Count a clip, which plays for ``seconds``."""
        self._clips.inc()
        self._frames.inc(num_frames)
        self._seconds.inc(seconds)
        self._encode.observe(encode_s)

    def open(self, num_jobs: int) -> None:
        self._open.set(num_jobs)

    def job(self, status: str, seconds: float) -> None:
        """Count one that is over, ``seconds`` after it was accepted; one of `STATUSES`."""
        self._jobs[status].inc()
        if status == "completed":
            self._job_seconds.observe(seconds)

    def kept(self, num_jobs: int, num_bytes: int) -> None:
        """What the folder holds, as a replica has just seen it."""
        self._kept.set(num_jobs)
        self._kept_bytes.set(num_bytes)
