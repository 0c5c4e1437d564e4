"""How long a clip is: frames, and how many of them a second, of what a request says."""

from __future__ import annotations

from typing import NamedTuple

from engines.drawing.info import ModelInfo
from service.errors import BadRequest
from service.web.videos.schema import VideoParams


class Length(NamedTuple):
    """Of a clip: its frames, and how many of them are shown a second."""

    num_frames: int
    fps: float

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def text(self) -> str:
        """As the API says it: seconds, at most three digits after the point."""
        return f"{round(self.seconds, 3):g}"


def length_of(params: VideoParams, info: ModelInfo) -> Length:
    """What is asked for, or the model's own.

    Raises:
        BadRequest: the model does not draw so many, or two fields say different things.
    """
    fps = params.fps or float(info.frames_per_second)
    num_frames, asked, param = info.default_num_frames, "", "num_frames"
    if params.seconds is not None:
        num_frames = round(float(params.seconds) * fps)
        asked, param = f"seconds is {params.seconds!r} at {fps:g} frames a second: ", "seconds"
        if params.num_frames not in (None, num_frames):
            raise BadRequest(
                f"{asked}{num_frames} frames, and num_frames is {params.num_frames}; send one of "
                "them",
                param="num_frames",
            )
    elif params.num_frames is not None:
        num_frames, asked = params.num_frames, "num_frames is "
    if not 1 <= num_frames <= info.max_num_frames:
        longest = Length(info.max_num_frames, fps)
        unit = " frames" if param == "seconds" else ""
        raise BadRequest(
            f"{asked}{num_frames}{unit}; this model draws 1 to {longest.num_frames} frames, which "
            f"are {longest.text} s at {fps:g} a second; send that at most, or a lower fps",
            param=param,
        )
    return Length(num_frames, fps)
