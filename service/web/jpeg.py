"""What stands in a JPEG file: its segments up to the end of the first image, within bounds.

Walked as libjpeg reads them (ITU-T T.81, Annex B), before it does. No pixel is decoded here.
"""

from __future__ import annotations

import re

from service.errors import BadRequest

SIGNATURE = b"\xff\xd8\xff"
# What ends coded data or begins a segment. FF is no marker before 00, before another FF and before
# RSTn; TEM and the reserved 02 to BF have no length.
MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
END_OF_IMAGE = b"\xd9"
START_OF_SCAN = b"\xda"
MAX_SCANS = 50  # encoders write up to 10; each is a pass over all pixels, however short
MAX_SEGMENTS = 4096  # 20 MB of metadata are 320 of full length; Pillow takes 2 µs for each
MAX_STRAY_BYTES = 2**16  # before the first scan, where Pillow looks at every byte by itself


def first_image(data: bytes, *, field: str) -> bytes:
    """The file up to the end of its first image.

    Behind it phones put films (motion photos), a second picture (MPO) or a map of brightness.

    Raises:
        BadRequest: more scans, segments or bytes between segments than any camera writes.
    """
    at, num_scans, num_segments, num_stray_bytes = 2, 0, 0, 0
    while found := MARKER.search(data, at):
        if found[1] == END_OF_IMAGE:
            return data[: found.end()]
        num_segments += 1
        if not num_scans:
            num_stray_bytes += found.start() - at
        num_scans += found[1] == START_OF_SCAN
        for count, limit, what in (
            (num_scans, MAX_SCANS, "JPEG scans"),
            (num_segments, MAX_SEGMENTS, "JPEG segments"),
            (num_stray_bytes, MAX_STRAY_BYTES, "bytes between its JPEG segments"),
        ):
            if count > limit:
                raise BadRequest(
                    f"{field} has more than {limit} {what}, which is all that is read; save it "
                    "again",
                    param=field,
                )
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        at = found.end() + max(length, 2)  # it counts its own two bytes
    return data
