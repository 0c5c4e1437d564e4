"""The REST schema of clips: OpenAI's Videos API with our extensions as plain extra fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from service.web.schema import MAX_SEED, DrawParams, FormParams, ImageReference
from service.web.videos.clips import ClipFormat

Seconds = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}(\.[0-9]{1,3})?$")]
MAX_FPS = 60
Status = Literal["queued", "in_progress", "completed", "failed"]


class VideoParams(DrawParams):
    """``POST /v1/videos``, however it is sent."""

    seconds: Seconds | None = Field(
        None, description="Duration, as text: so many seconds of fps frames. Or num_frames."
    )
    num_frames: int | None = Field(
        None, ge=1, description="Frames that are drawn. Default: the model's own number."
    )
    fps: float | None = Field(
        None,
        ge=1,
        le=MAX_FPS,
        description="Frames a second that are shown; by default the model's own. What is drawn "
        "does not depend on it.",
    )
    output_format: ClipFormat = Field(
        "mp4", description="`mp4`: H.264; `webp` and `gif`: animated images."
    )
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of mp4 and webp, in percent (default 90)."
    )
    seed: int | None = Field(None, ge=0, lt=MAX_SEED + 1, description="Of the clip as a whole.")


class VideoRequest(VideoParams):
    """A clip as JSON."""

    input_reference: ImageReference | None = Field(
        None, description="Refused: clips are drawn from text alone."
    )


class VideoForm(VideoParams, FormParams):
    """A clip as a form, which is how OpenAI's client sends it."""


class VideoError(BaseModel):
    """Why there is no clip, in the words of OpenAI's error object."""

    code: str
    message: str
    type: str | None = None
    param: str | None = None


class Video(BaseModel):
    """A job and its clip, as it is now."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: int = Field(ge=0, le=100, description="Percent of the steps and of the decoding.")
    created_at: int = Field(description="Unix time, in seconds, as the next two.")
    completed_at: int | None
    expires_at: int | None = Field(description="When the job and its clip are gone.")
    error: VideoError | None
    model: str
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None = None
    num_frames: int
    fps: float
    output_format: ClipFormat
    seed: int
    num_inference_steps: int
    timesteps: list[int] | None
    guidance_scale: float
    sampler: str
    decoder: str
    loras: dict[str, float]
    timings: dict[str, float] | None = Field(description="Milliseconds; null until it is over.")
    warnings: list[str]


class VideoList(BaseModel):
    """``GET /v1/videos``: a page of the caller's own jobs."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """``DELETE /v1/videos/{video_id}``."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
