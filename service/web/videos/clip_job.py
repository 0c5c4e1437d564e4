"""One clip on its way: a `Job` of one row whose frames become a file."""

from __future__ import annotations

import numpy as np

from service.access.quota import Tenant
from service.batching.request import Status
from service.replica import Replica
from service.web.admission import Admitted
from service.web.job import Job
from service.web.videos.clips import encode_clip, encode_thumbnail
from service.web.videos.length import Length
from service.web.videos.schema import VideoParams


class AsClip:
    """The `Encoding` of a clip, and of its thumbnail where it is for a job."""

    def __init__(
        self, params: VideoParams, length: Length, replica: Replica, *, with_thumbnail: bool
    ) -> None:
        self.thumbnail = b""  # once it is encoded
        self._params, self._length, self._replica = params, length, replica
        self._with_thumbnail = with_thumbnail

    def encode(self, pixels: np.ndarray, row_index: int, *, final: bool) -> bytes:
        frames = pixels.reshape(-1, *pixels.shape[-3:])
        params, settings = self._params, self._replica.settings
        if self._with_thumbnail:
            self.thumbnail = encode_thumbnail(frames, settings)
        quality = params.output_compression
        return encode_clip(
            frames, params.output_format, self._length.fps, settings, quality=quality
        )

    def count(self, encode_s: float | None) -> None:
        clips = self._replica.metrics.clips
        clips.made(self._length.num_frames, self._length.seconds, encode_s or 0.0)


class ClipJob(Job):
    """An accepted clip. ``length`` is what `length_of` made of ``params``."""

    def __init__(
        self,
        replica: Replica,
        params: VideoParams,
        admitted: Admitted,
        length: Length,
        *,
        request_id: str,
        tenant: Tenant,
        deadline: float,
        with_thumbnail: bool,
    ) -> None:
        self.encoding = AsClip(params, length, replica, with_thumbnail=with_thumbnail)
        super().__init__(
            replica,
            admitted,
            self.encoding,
            request_id=request_id,
            tenant=tenant,
            deadline=deadline,
        )

    async def clip(self) -> bytes:
        """The file.

        Raises:
            ServiceError: the request ended any other way.
        """
        return [item async for item in self.items()][-1].data

    @property
    def is_running(self) -> bool:
        """Whether an engine call has been made for it."""
        return self.request.status is not Status.WAITING

    @property
    def progress(self) -> int:
        """Percent: of its steps, and of decoding, which counts as one more. 100 is for who has the
        file. May be asked from any thread.
        """
        drawing = self.request.rows[0].drawing
        canvas, grid = drawing.canvas, drawing.grid
        decoded = float(drawing.pixels is not None)
        if canvas is not None and grid is not None:
            decoded = canvas.index / len(grid)
        return min(99, int(100 * (drawing.step_index + decoded) / (drawing.num_steps + 1)))
