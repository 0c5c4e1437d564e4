"""Frames to files: how clips are encoded. Runs in worker threads.

MP4 is made by the ``ffmpeg`` program that imageio-ffmpeg brings (or ``IMAGEIO_FFMPEG_EXE`` names):
run, not linked, as the x264 in it is under the GPL.
"""

from __future__ import annotations

import io
import logging
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from service.errors import EngineFailure
from service.web.images import DEFAULT_QUALITY

if TYPE_CHECKING:
    from service.settings import Settings

logger = logging.getLogger("fourstep.clips")

ClipFormat = Literal["mp4", "webp", "gif"]
CLIP_MEDIA_TYPES: dict[ClipFormat, str] = {
    "mp4": "video/mp4",
    "webp": "image/webp",
    "gif": "image/gif",
}
ENCODE_TIMEOUT_S = 120.0  # 16 frames of 512 px take 0.2 s on one core (2026-11-27)
# Tagged as what they are: without tags players guess BT.601 or BT.709 by the size.
COLOURS = ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709")
H264 = (
    "-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p",
    "-c:v", "libx264", "-preset", "veryfast", "-threads", "1", *COLOURS,
    "-movflags", "+faststart",  # the index first: playing begins before all is there
    "-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact",
)  # fmt: skip


def encode_clip(
    pixels: np.ndarray,
    output_format: ClipFormat,
    fps: float,
    settings: Settings,
    *,
    quality: int | None = None,
) -> bytes:
    """Encode uint8 ``[F, H, W, 3]`` as MP4 (H.264, yuv420p), or as animated WebP or GIF.

    ``quality`` (0-100, default 90) is for MP4 and WebP. H.264 has even sides: an odd one is
    doubled at its edge. WebP and GIF have equal frames in a row as one that stays for longer.

    Raises:
        EngineFailure: there is no ffmpeg, or it failed; its own words are in the log.
    """
    quality = DEFAULT_QUALITY if quality is None else quality
    if output_format == "mp4":
        return _mp4(pixels, fps, quality)
    frames = [Image.fromarray(frame) for frame in pixels]
    buffer, rest = io.BytesIO(), {"save_all": True, "append_images": frames[1:], "loop": 0}
    if output_format == "gif":
        frames[0].save(buffer, "GIF", duration=_durations_ms(len(frames), fps, 10), **rest)
    else:
        frames[0].save(
            buffer, "WEBP", duration=_durations_ms(len(frames), fps, 1), quality=quality,
            method=settings.webp_method, **rest,
        )  # fmt: skip
    return buffer.getvalue()


def encode_thumbnail(pixels: np.ndarray, settings: Settings) -> bytes:
    """The frame in the middle of uint8 ``[F, H, W, 3]`` as WebP."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[len(pixels) // 2])
    image.save(buffer, "WEBP", quality=DEFAULT_QUALITY, method=settings.webp_method)
    return buffer.getvalue()


def _durations_ms(num_frames: int, fps: float, unit_ms: int) -> list[int]:
    """Of each frame in whole units, rounded so that the clip as a whole keeps its time."""
    ends = [round((index + 1) * 1000 / fps / unit_ms) for index in range(num_frames)]
    return [max(1, end - begin) * unit_ms for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _mp4(pixels: np.ndarray, fps: float, quality: int) -> bytes:
    _, height, width, _ = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        _, height, width, _ = pixels.shape
    rate = Fraction(fps).limit_denominator(1001)
    crf = round(40 - quality / 4)  # x264's scale: 90 is 18, near to what the eye cannot tell
    with tempfile.TemporaryDirectory(prefix="fourstep-clip-") as folder:
        file = Path(folder) / "clip.mp4"  # its index goes to the front at the end
        command = [
            _ffmpeg(), "-nostdin", "-hide_banner", "-loglevel", "error",
            "-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}",
            "-framerate", str(rate), "-i", "pipe:0", *H264, "-crf", str(crf), str(file),
        ]  # fmt: skip
        try:
            subprocess.run(
                command,
                input=np.ascontiguousarray(pixels).data,
                capture_output=True,
                check=True,
                timeout=ENCODE_TIMEOUT_S,
            )
            return file.read_bytes()
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or b""
            logger.error("ffmpeg failed: %s %s", error, said.decode(errors="replace")[:500])
            raise EngineFailure(
                "the clip could not be encoded as MP4 (the log has the details); ask for "
                "output_format 'webp'",
                code="encoding_failure",
            ) from error


def _ffmpeg() -> str:
    try:
        import imageio_ffmpeg  # here: 30 MB of a program that pictures do without

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise EngineFailure(
            "there is no ffmpeg here to make MP4 (IMAGEIO_FFMPEG_EXE names one); ask for "
            "output_format 'webp'",
            code="encoding_failure",
        ) from error
