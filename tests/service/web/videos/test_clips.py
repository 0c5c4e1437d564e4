"""Clips as files, read again by other libraries: PyAV (MP4) and Pillow."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from service.errors import EngineFailure
from service.settings import Settings
from service.web.videos.clips import encode_clip, encode_thumbnail


def moving(num_frames: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 ``[F, H, W, 3]``: smooth colours, and a bright square that goes to the right."""
    ramp = np.linspace(40, 200, width, dtype=np.uint8)
    frames = np.stack([np.tile(ramp, (height, 1))] * 3, axis=-1)[np.newaxis].repeat(num_frames, 0)
    frames[..., 2] = 90
    for index, frame in enumerate(frames):
        frame[8:24, 3 * index : 3 * index + 16] = (230, 60, 20)
    return frames


def read_mp4(data: bytes) -> tuple[np.ndarray, Fraction, av.VideoStream]:
    """Its frames as uint8 ``[F, H, W, 3]``, frames a second, and what the file says of itself."""
    with av.open(io.BytesIO(data)) as container:
        (stream,) = container.streams.video
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate is not None
        return np.stack(frames), stream.average_rate, stream


@pytest.mark.parametrize("fps", [8, 7.5, 23.976, 60])
def test_an_mp4_has_every_frame_in_its_place(fps: float) -> None:
    pixels = moving()
    data = encode_clip(pixels, "mp4", fps, Settings())
    frames, rate, stream = read_mp4(data)
    assert frames.shape == pixels.shape
    assert float(rate) == pytest.approx(fps, rel=1e-4)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert np.abs(frames.astype(int) - pixels).mean() < 3  # BT.709 in, BT.709 out
    assert data.index(b"moov") < data.index(b"mdat")  # playing begins before all is there


def test_an_odd_side_becomes_even_by_its_own_edge() -> None:
    pixels = moving(3, 45, 61)
    frames, _, _ = read_mp4(encode_clip(pixels, "mp4", 8, Settings()))
    assert frames.shape == (3, 46, 62, 3)
    assert np.abs(frames[:, :45, :61].astype(int) - pixels).mean() < 3


def test_the_same_frames_are_the_same_file() -> None:
    one, other = (encode_clip(moving(), "mp4", 8, Settings()) for _ in range(2))
    assert one == other
    small = encode_clip(moving(), "mp4", 8, Settings(), quality=20)
    assert len(small) < len(one)


@pytest.mark.parametrize(("output_format", "unit_ms"), [("webp", 1), ("gif", 10)])
@pytest.mark.parametrize("fps", [8, 7])
def test_pillow_reads_what_moves(output_format: str, unit_ms: int, fps: int) -> None:
    pixels = moving()
    data = encode_clip(pixels, output_format, fps, Settings())  # type: ignore[arg-type]
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == (output_format.upper(), (64, 48))
    assert image.n_frames == 12  # type: ignore[attr-defined]
    assert image.info["loop"] == 0
    total_ms = 0
    for index in range(12):
        image.seek(index)
        shown = np.asarray(image.convert("RGB"))
        assert np.abs(shown.astype(int) - pixels[index]).mean() < 6
        total_ms += image.info["duration"]
    assert abs(total_ms - 1000 * 12 / fps) <= unit_ms  # though no frame may have 1/7 s


def test_a_clip_of_one_frame(tmp_path: Path) -> None:
    pixels = moving(1)
    assert read_mp4(encode_clip(pixels, "mp4", 8, Settings()))[0].shape == pixels.shape
    for output_format in ("webp", "gif"):
        data = encode_clip(pixels, output_format, 8, Settings())  # type: ignore[arg-type]
        assert Image.open(io.BytesIO(data)).size == (64, 48)


def test_a_thumbnail_is_the_frame_in_the_middle() -> None:
    pixels = moving(3)
    image = Image.open(io.BytesIO(encode_thumbnail(pixels, Settings())))
    assert image.format == "WEBP"
    assert np.abs(np.asarray(image).astype(int) - pixels[1]).mean() < 6


@pytest.mark.parametrize("program", ["/nowhere/ffmpeg", "/bin/false"])
def test_without_a_working_ffmpeg_the_way_out_is_named(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program)
    with pytest.raises(EngineFailure, match="ask for output_format 'webp'") as caught:
        encode_clip(moving(2), "mp4", 8, Settings())
    assert caught.value.code == "encoding_failure"
