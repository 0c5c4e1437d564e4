"""Embedded colour profiles: pictures of other colour spaces become sRGB, which models have seen.

A profile is a small program by a stranger: what it may cost is bounded before it is run.
"""

from __future__ import annotations

import io
import struct

from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 * 2**20  # of offset printing, the largest in use, up to 3 MB
HEADER_BYTES = 128  # ICC.1:2022, 7.2; the table of tags follows: a count, then 12 bytes each
MAX_TAGS = 100  # Little CMS opens no profile of more


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode L, RGB or CMYK as RGB in sRGB; it may be changed in place.

    Without a profile, or with one that is damaged, too large or of another kind of colours, the
    values are taken for sRGB's, and CMYK's for the complements.
    """
    if profile and len(profile) <= MAX_PROFILE_BYTES:
        try:
            return _convert(image, profile)
        except (ImageCms.PyCMSError, OSError, ValueError, struct.error):
            pass
    return image.convert("RGB")


def _convert(image: Image.Image, profile: bytes) -> Image.Image:
    source = ImageCms.ImageCmsProfile(io.BytesIO(_without_pipelines(profile)))
    if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
        image = image.convert("RGB")  # what many programs write for grey pictures
    transform = ImageCms.buildTransform(
        source, ImageCms.createProfile("sRGB"), image.mode, "RGB", ImageCms.Intent.PERCEPTUAL
    )
    return transform.apply(image, image if image.mode == "RGB" else None)


def _without_pipelines(profile: bytes) -> bytes:
    """Without its D2Bx tags: optional doubles of others, in which 240 KB can name 30,000 steps.

    Little CMS ran such a chain for 18 s (one core, 2026-11-26).
    """
    (num_tags,) = struct.unpack_from(">I", profile, HEADER_BYTES)
    changed = bytearray(profile)
    for index in range(min(num_tags, MAX_TAGS)):
        at = HEADER_BYTES + 4 + 12 * index
        if changed[at : at + 3] == b"D2B":
            changed[at : at + 3] = b"not"
    return bytes(changed)
