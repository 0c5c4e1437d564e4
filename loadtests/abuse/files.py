"""Uploads that are small to send and large to decode, and some that are just large."""

from __future__ import annotations

import random
import struct
import zlib

SIDE_PX = 4096  # of a side: as many pixels as a service takes by default
NOISE_PX = 2500  # of a side, whose bytes nothing makes fewer: 19 MB, just below the default bound
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, RGBA = 0, 2, 6  # colour types (PNG specification, 11.2.2)


def png(side_px: int, depth: int, color: int, row: bytes, *, level: int = 1) -> bytes:
    """A square one whose rows are all the same; ``level`` 0 stores them as they are."""
    header = struct.pack(">IIBBBBB", side_px, side_px, depth, color, 0, 0, 0)
    rows = zlib.compress((b"\0" + row) * side_px, level)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def uploads() -> dict[str, bytes]:
    """By what they are."""
    wave = b"".join(struct.pack(">H", 15 * x) for x in range(SIDE_PX))
    noise = random.Random(1).randbytes(3 * NOISE_PX)
    return {
        "16-bit grey": png(SIDE_PX, 16, GREY, wave),
        "16-bit RGB": png(SIDE_PX, 16, RGB, bytes(6 * SIDE_PX)),
        "8-bit RGBA": png(SIDE_PX, 8, RGBA, wave * 2),
        "19 MB": png(NOISE_PX, 8, RGB, noise, level=0),
    }
