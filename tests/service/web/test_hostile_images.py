"""Uploads, damaged and hostile: a picture, or a refusal that says why, in bounded memory."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from service.errors import BadRequest, TooLarge
from service.web.jpeg import MAX_SCANS, MAX_SEGMENTS, MAX_STRAY_BYTES
from service.web.uploads import MAX_PNG_CHUNKS, decode_picture
from tests.service.web.files import chunk, saved

MAX_PX = 200 * 200
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


ANIMATED = {"save_all": True, "append_images": [PICTURE.rotate(180)], "duration": 50}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FILES = {
    "png": saved(PICTURE, "PNG"),
    "png palette": saved(PICTURE.quantize(16), "PNG", transparency=3),
    "png 16 bit": saved(Image.fromarray(PIXELS[..., 0].astype(np.uint16) << 8), "PNG"),
    "png bilevel": saved(PICTURE.convert("1"), "PNG"),
    "png alpha": saved(PICTURE.convert("RGBA"), "PNG", icc_profile=SRGB, exif=oriented(6)),
    "png animated": saved(PICTURE, "PNG", **ANIMATED),
    "jpeg": saved(PICTURE, "JPEG", exif=oriented(5), icc_profile=SRGB),
    "jpeg grey": saved(PICTURE.convert("L"), "JPEG"),
    "jpeg cmyk": saved(PICTURE.convert("CMYK"), "JPEG"),
    "jpeg progressive": saved(PICTURE, "JPEG", progressive=True),
    "webp": saved(PICTURE, "WEBP", exif=oriented(8)),
    "webp lossless": saved(PICTURE.convert("RGBA"), "WEBP", lossless=True),
    "webp animated": saved(PICTURE, "WEBP", **ANIMATED),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_is_read_as_pillow_reads_it(name: str) -> None:
    with Image.open(io.BytesIO(FILES[name])) as image:
        expected = ImageOps.exif_transpose(image)
        if name == "png 16 bit":  # Pillow's own conversion makes everything above 255 white
            expected = Image.fromarray(PIXELS[..., 0])
        if expected.has_transparency_data:
            white = Image.new("RGBA", expected.size, "white")
            expected = Image.alpha_composite(white, expected.convert("RGBA"))
        wanted = np.asarray(expected.convert("RGB"), np.int16)
    found = decode_picture(FILES[name], max_px=MAX_PX).over_white()
    assert found.dtype == np.uint8
    assert np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_every_orientation_is_turned_upright(value: int, file_format: str) -> None:
    data = saved(PICTURE, file_format, exif=oriented(value))
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode_picture(data, max_px=MAX_PX).over_white(), wanted)


def cut(data: bytes, at: int, _: bytes) -> bytes:
    return data[: at % len(data)]


def flip(data: bytes, at: int, noise: bytes) -> bytes:
    damaged = bytearray(data)
    for index, value in enumerate(noise):
        damaged[(at + 37 * index) % len(data)] ^= value
    return bytes(damaged)


def insert(data: bytes, at: int, noise: bytes) -> bytes:
    return data[: at % len(data)] + noise + data[at % len(data) :]


def splice(data: bytes, at: int, noise: bytes) -> bytes:
    """The head of one file and the tail of another."""
    other = list(FILES.values())[sum(noise) % len(FILES)]
    return data[: at % len(data)] + other[at % len(other) :]


def repeat(data: bytes, at: int, _: bytes) -> bytes:
    return data[: at % len(data)] * 2 + data[at % len(data) :]


def dimensions(data: bytes, at: int, noise: bytes) -> bytes:
    """Any size in the places where PNG and WebP headers hold it."""
    size = (noise * 8)[:8].ljust(8, b"\xff")
    start = 16 if data.startswith(b"\x89PNG") else 24
    damaged = data[:start] + size + data[start + 8 :]
    if data.startswith(b"\x89PNG"):  # a right checksum, so that the size is believed
        damaged = damaged[:29] + struct.pack(">I", zlib.crc32(damaged[12:29])) + damaged[33:]
    return damaged


@given(
    name=st.sampled_from(sorted(FILES)),
    damage=st.lists(
        st.tuples(
            st.sampled_from([cut, flip, insert, splice, repeat, dimensions]),
            st.integers(0, 10_000),
            st.binary(min_size=1, max_size=12),
        ),
        min_size=1,
        max_size=3,
    ),
)
@example(name="png", damage=[(dimensions, 0, b"\x7f\xff\xff\xff")])
@example(name="webp animated", damage=[(dimensions, 0, b"\xff\xff\xff\xff")])
@settings(
    max_examples=400, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
def test_damaged_files_are_read_or_refused(name: str, damage: list[tuple[Any, int, bytes]]) -> None:
    data = FILES[name]
    for change, at, noise in damage:
        data = change(data, at, noise) or b"\x00"
    try:
        pixels = decode_picture(data, max_px=MAX_PX).over_white()
    except (BadRequest, TooLarge) as refused:
        error = refused
    else:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert pixels.size <= 3 * MAX_PX
        return
    assert error.param == "image"
    assert len(error.message) < 400
    assert "\n" not in error.message


def png_of(width: int, height: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    tail = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + tail


def bombs() -> dict[str, bytes]:
    """Small files that ask for gigabytes or minutes."""
    zeros = zlib.compress(bytes(300 * 2**20), 1)
    rows = bytes((1 + 3 * 40) * 24)
    jpeg = FILES["jpeg progressive"]
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    huge_jpeg = bytearray(FILES["jpeg grey"])
    start = huge_jpeg.index(b"\xff\xc0") + 5
    huge_jpeg[start : start + 4] = b"\xff\xdc\xff\xdc"
    canvas = struct.pack("<I", 16383)[:3]
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\x10\x00\x00\x00" + canvas + canvas
    webp = FILES["webp"][12:]
    return {
        "png of 2^31 pixels a side": png_of(2**31 - 1, 2**31 - 1),
        "png of 20,000 pixels a side": png_of(20_000, 20_000),
        "png whose rows never end": png_of(40, 24, rows=rows + bytes(300 * 2**20)),
        "png with a text that unfolds": png_of(40, 24, chunk(b"zTXt", b"a\0\0" + zeros), rows=rows),
        "png with a profile that unfolds": png_of(
            40, 24, chunk(b"iCCP", b"a\0\0" + zeros), rows=rows
        ),
        "png of 2^31 frames": png_of(
            40, 24, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), rows=rows
        ),
        "jpeg of 65,500 pixels a side": bytes(huge_jpeg),
        "jpeg of a thousand scans": jpeg[:-2] + 1000 * scan + b"\xff\xd9",
        "webp of 16,384 pixels a side": b"RIFF"
        + struct.pack("<I", 4 + len(vp8x) + len(webp))
        + b"WEBP"
        + vp8x
        + webp,
    }


def test_bombs_cost_neither_memory_nor_time() -> None:
    """In a process of its own, where the peak of memory is this test's alone."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import survive; survive()"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert len(lines) == len(bombs())
    assert max(map(int, lines.values())) < 100, lines  # MiB; each asks for 300 or far more


def survive() -> None:
    """Decode every bomb; print by how many MiB the process has grown at its peak."""
    files = bombs()  # making them takes more than reading them should
    decode_picture(FILES["png"], max_px=4096 * 4096).over_white()

    def clear_peak() -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    def peak_kib() -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

    for name, data in files.items():
        clear_peak()
        before = peak_kib()
        with contextlib.suppress(BadRequest, TooLarge):
            decode_picture(data, max_px=4096 * 4096).over_white()
        print(f"{name}: {(peak_kib() - before) // 1024}")


PROGRESSIVE = FILES["jpeg progressive"]
SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
NUM_SCANS = PROGRESSIVE.count(b"\xff\xda")
NUM_SEGMENTS = len(re.findall(rb"\xff[\xc0-\xcf\xda-\xfe]", PROGRESSIVE))
JFIF = slice(2, 20)  # where its first segment is
COMMENT = b"\xff\xfe\x00\x03x"


@pytest.mark.parametrize(
    ("repeated", "at", "limit", "what"),
    [
        (SCAN, -2, MAX_SCANS - NUM_SCANS, f"{MAX_SCANS} JPEG scans"),
        (COMMENT, JFIF.stop, MAX_SEGMENTS - NUM_SEGMENTS, f"{MAX_SEGMENTS} JPEG segments"),
        (b"\0", JFIF.stop, MAX_STRAY_BYTES, f"{MAX_STRAY_BYTES} bytes between"),
    ],
    ids=["scans", "segments", "stray bytes"],
)
def test_what_a_jpeg_holds_is_bounded(repeated: bytes, at: int, limit: int, what: str) -> None:
    def times(count: int) -> bytes:
        return PROGRESSIVE[:at] + count * repeated + PROGRESSIVE[at:]

    assert decode_picture(times(limit), max_px=MAX_PX).over_white().shape == PIXELS.shape
    for count in (limit + 1, 50 * limit):
        with pytest.raises(BadRequest, match=f"image has more than {what}"):
            decode_picture(times(count), max_px=MAX_PX).over_white()


def test_the_chunks_of_a_png_are_bounded() -> None:
    png, padding = FILES["png"], chunk(b"teSt", b"")
    num_chunks = len(re.findall(b"IHDR|IDAT", png))

    def times(count: int) -> bytes:
        return png[:33] + count * padding + png[33:] + 3 * MAX_PNG_CHUNKS * padding

    plain = decode_picture(png, max_px=MAX_PX).over_white()
    most = MAX_PNG_CHUNKS - num_chunks
    assert np.array_equal(decode_picture(times(most), max_px=MAX_PX).over_white(), plain)
    with pytest.raises(BadRequest, match=f"image has more than {MAX_PNG_CHUNKS} PNG chunks"):
        decode_picture(times(most + 1), max_px=MAX_PX).over_white()
