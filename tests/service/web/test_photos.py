"""Pictures as phones, cameras and programs write them: what Pillow and Little CMS see in them.

Colour profiles are made here tag by tag (ICC.1:2022), so that their right values can be computed.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from service.errors import BadRequest
from service.web import icc
from service.web.uploads import decode_picture
from tests.service.web.files import chunk, saved

MAX_PX = 300 * 300
GRADIENT = np.stack(  # smooth, so that JPEG keeps it nearly as it is
    np.broadcast_arrays(
        np.linspace(0, 255, 40)[None, :],
        np.linspace(255, 0, 24)[:, None],
        np.linspace(60, 200, 40)[None, :],
    ),
    axis=-1,
).astype(np.uint8)
PICTURE = Image.fromarray(GRADIENT)


def read_by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def read(data: bytes) -> np.ndarray:
    return decode_picture(data, max_px=MAX_PX).over_white()


def png_of(samples: np.ndarray, colour_type: int, *chunks: bytes) -> bytes:
    """A PNG of uint8 or uint16 ``[H, W, channels]``, unfiltered."""
    height, width, _ = samples.shape
    depth = 8 * samples.dtype.itemsize
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    big_endian = samples.astype(samples.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in big_endian)
    tail = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + tail


# -- JPEG files and what is behind or between their segments ------------------------------------

JPEG = saved(PICTURE, "JPEG", quality=95)
SCANS = 3000 * b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"  # as many a film has by chance


def with_segments(data: bytes, *segments: tuple[bytes, bytes]) -> bytes:
    """``data`` with segments (marker, content) behind its first."""
    at = 4 + int.from_bytes(data[4:6], "big")
    written = b"".join(
        b"\xff" + marker + struct.pack(">H", 2 + len(content)) + content
        for marker, content in segments
    )
    return data[:at] + written + data[at:]


def thumbnail() -> Image.Exif:
    exif = Image.Exif()
    exif[0x010E] = SCANS.decode("latin-1")  # ImageDescription: any bytes do for the walk
    return exif


JPEGS = {
    "motion photo": JPEG + b"\0\0\0\x18ftypmp42" + SCANS + 3 * 2**20 * b"\xff\xda",
    "many metadata segments": with_segments(JPEG, *[(b"\xe1", SCANS)] * 60),
    "Exif with scans in it": saved(PICTURE, "JPEG", quality=95, exif=thumbnail()),
    "restart markers": saved(PICTURE, "JPEG", quality=95, restart_marker_blocks=1),
    "progressive": saved(PICTURE, "JPEG", quality=95, progressive=True) + SCANS,
    "fill bytes": with_segments(JPEG, (b"\xff\xff\xff\xfe", b"a comment")),
    "MPO": saved(
        PICTURE, "MPO", quality=95, save_all=True,
        append_images=[PICTURE.rotate(180)] + [PICTURE.resize((200, 200))] * 60,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JPEGS)
def test_the_first_image_of_a_jpeg_is_read(name: str) -> None:
    found = read(JPEGS[name])
    assert np.array_equal(found, read_by_pillow(JPEGS[name]))
    assert np.abs(found - GRADIENT.astype(np.int16)).max() < 12


# -- Modes --------------------------------------------------------------------------------------


def test_cmyk_is_read_as_adobe_writes_it() -> None:
    """Inverted; libjpeg says so in an APP14 segment, which some files lack."""
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = saved(cmyk, "JPEG", quality=95)
    assert data[2:4] == b"\xff\xee"
    without = data[:2] + data[18:]
    for each in (data, without):
        assert np.array_equal(read(each), read_by_pillow(each))
        assert np.abs(read(each)[8, 8].astype(int) - (255, 0, 0)).max() <= 2


def test_sixteen_bits_keep_their_upper_eight() -> None:
    samples = np.random.default_rng(0).integers(0, 2**16, (24, 40, 4), np.uint16)
    colours, alpha = samples[..., :3], samples[..., 3:]
    assert np.array_equal(read(png_of(colours, 2)), colours >> 8)
    grey = samples[..., :1]
    assert np.array_equal(read(png_of(grey, 0)), np.repeat(grey >> 8, 3, axis=-1))
    transparent = chunk(b"tRNS", grey[5, 7].astype(">u2").tobytes())
    assert read(png_of(grey, 0, transparent))[5, 7].tolist() == [255, 255, 255]
    share = (alpha >> 8) / 255
    over_white = share * (colours >> 8) + (1 - share) * 255
    assert np.abs(read(png_of(samples, 6)) - over_white).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA"])
def test_every_mode_of_png_is_read_over_white(mode: str) -> None:
    image = PICTURE.convert("L" if mode in ("1", "LA") else "RGB").convert(mode.removesuffix("A"))
    options = {"transparency": bytes(range(256))} if mode == "PA" else {}
    if mode in ("LA", "RGBA"):
        image.putalpha(PICTURE.getchannel("G"))
    data = saved(image, "PNG", **options)
    with Image.open(io.BytesIO(data)) as image:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        wanted = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"), np.int16)
    assert np.abs(read(data) - wanted).max() <= 1


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(file_format: str) -> None:
    others = [PICTURE.rotate(180), Image.new("RGB", PICTURE.size, "red")]
    data = saved(PICTURE, file_format, save_all=True, append_images=others, lossless=True)
    assert np.array_equal(read(data), GRADIENT)


# -- Colour profiles ----------------------------------------------------------------------------


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 2**16)) for value in values)


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + fixed(*values)


def gamma(exponent: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 256))


D50 = (0.9642, 1.0, 0.8249)


def profile_of(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    at = 132 + 12 * len(tags)
    table, content = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        padded = tag + bytes(-len(tag) % 4)
        table += name + struct.pack(">II", at + len(content), len(padded))
        content += padded
    head = struct.pack(">I4sI4s4s4s", at + len(content), b"lcms", 0x04300000, b"mntr", space, pcs)
    head += bytes(12) + b"acsp" + bytes(28) + fixed(*D50)
    return head.ljust(128, b"\0") + table + content


def rgb_tags(matrix: np.ndarray, exponent: float) -> dict[bytes, bytes]:
    columns = {name: xyz(*matrix[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    curves = {name: gamma(exponent) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return {b"wtpt": xyz(*D50)} | columns | curves


# RGB → XYZ, adapted to D50: Bruce Lindbloom's tables; Display P3's by Apple's own profile.
SRGB_MATRIX = np.array(
    [[0.4360747, 0.3850649, 0.1430804],
     [0.2225045, 0.7168786, 0.0606169],
     [0.0139322, 0.0971045, 0.7141733]]
)  # fmt: skip
ADOBE_MATRIX = np.array(
    [[0.6097559, 0.2052401, 0.1492240],
     [0.3111242, 0.6256560, 0.0632197],
     [0.0194811, 0.0608902, 0.7448387]]
)  # fmt: skip
P3_MATRIX = np.array(
    [[0.51512, 0.29198, 0.15710],
     [0.24120, 0.69225, 0.06657],
     [-0.00105, 0.04189, 0.78407]]
)  # fmt: skip
SPACES = {"Adobe RGB": (ADOBE_MATRIX, 563 / 256), "Display P3": (P3_MATRIX, 2.2)}


def in_srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1's curve, from 0 to 1 to uint8."""
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.int16)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_wide_colours_become_srgb(name: str, file_format: str) -> None:
    matrix, exponent = SPACES[name]
    profile = profile_of(b"RGB ", b"XYZ ", rgb_tags(matrix, exponent))
    options = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[file_format]
    data = saved(PICTURE, file_format, icc_profile=profile, **options)
    values = read_by_pillow(data)
    wanted = in_srgb((values / 255) ** exponent @ (np.linalg.inv(SRGB_MATRIX) @ matrix).T)
    assert np.abs(wanted - values).max() > 20, "the profile says little"
    assert np.abs(read(data) - wanted).max() <= 2


def test_grey_profiles_and_those_of_grey_pictures_count() -> None:
    grey = PICTURE.convert("L")
    linear = profile_of(b"GRAY", b"XYZ ", {b"wtpt": xyz(*D50), b"kTRC": gamma(1)})
    as_rgb = profile_of(b"RGB ", b"XYZ ", rgb_tags(SRGB_MATRIX, 1))
    wanted = np.repeat(in_srgb(np.asarray(grey)[..., None] / 255), 3, axis=-1)
    for profile in (linear, as_rgb):
        assert np.abs(read(saved(grey, "PNG", icc_profile=profile)) - wanted).max() <= 3
    sixteen = (np.asarray(grey).astype(np.uint16) << 8)[..., None]
    packed = chunk(b"iCCP", b"linear\0\0" + zlib.compress(linear))
    assert np.abs(read(png_of(sixteen, 0, packed)) - wanted).max() <= 3


def test_a_profile_changes_colours_and_not_transparency() -> None:
    profile = profile_of(b"RGB ", b"XYZ ", rgb_tags(ADOBE_MATRIX, 563 / 256))
    colours = read(saved(PICTURE, "PNG", icc_profile=profile))
    image = PICTURE.copy()
    image.putalpha(PICTURE.getchannel("G"))
    share = GRADIENT[..., 1:2] / 255
    wanted = share * colours + (1 - share) * 255
    assert np.abs(read(saved(image, "PNG", icc_profile=profile)) - wanted).max() <= 1


def test_cmyk_profiles_count() -> None:
    """By a table of 2 x 2 x 2 x 2 points to Lab, as printing profiles have them (lut8Type)."""
    ramp = bytes(range(256))
    points = np.indices((2, 2, 2, 2)).reshape(4, -1).T  # of C, M, Y and K, without and with ink
    lightness = 255 * (1 - points[:, 3]) * (1 - 0.3 * points[:, :3].mean(axis=1))
    a = 128 + 60 * (points[:, 1] - points[:, 0])
    b = 128 + 60 * (points[:, 2] - points[:, 0])
    table = np.stack([lightness, a, b], axis=-1).astype(np.uint8).tobytes()
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += 4 * ramp + table + 3 * ramp
    profile = profile_of(b"CMYK", b"Lab ", {b"wtpt": xyz(*D50), b"A2B0": lut})
    data = saved(PICTURE.convert("CMYK"), "JPEG", quality=95, icc_profile=profile)
    with Image.open(io.BytesIO(data)) as image:
        by_little_cms = ImageCms.profileToProfile(
            image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    assert by_little_cms is not None
    assert np.abs(np.asarray(by_little_cms, np.int16) - read_by_pillow(data)).max() > 20
    assert np.array_equal(read(data), np.asarray(by_little_cms))


P3 = profile_of(b"RGB ", b"XYZ ", rgb_tags(*SPACES["Display P3"]))
USELESS = {
    "noise": np.random.default_rng(0).bytes(3000),
    "cut off": P3[:200],
    "header alone": P3[:128],
    "a count that lies": P3[:128] + b"\xff\xff\xff\xff" + P3[132:],
    "of grey for colours": profile_of(b"GRAY", b"XYZ ", {b"wtpt": xyz(*D50), b"kTRC": gamma(1)}),
    "of CMYK without a table": profile_of(b"CMYK", b"Lab ", {b"wtpt": xyz(*D50)}),
    "too large": P3 + bytes(icc.MAX_PROFILE_BYTES),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_profile_that_says_nothing_leaves_the_picture_as_it_is(name: str) -> None:
    data = saved(PICTURE, "JPEG", quality=95, icc_profile=USELESS[name])
    assert np.array_equal(read(data), read_by_pillow(data))


def test_a_profile_cannot_name_a_million_steps() -> None:
    """In its table of steps all entries may be the same one: Little CMS would run every one."""
    step = b"matf" + bytes(4) + struct.pack(">HH12f", 3, 3, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    num_steps = 100_000
    chain = b"mpet" + bytes(4) + struct.pack(">HHI", 3, 3, num_steps)
    chain += num_steps * struct.pack(">II", 16 + 8 * num_steps, len(step)) + step
    tags = rgb_tags(*SPACES["Display P3"])
    bomb = profile_of(b"RGB ", b"XYZ ", tags | {b"D2B0": chain})
    plain = read(saved(PICTURE, "PNG", icc_profile=P3))
    assert np.array_equal(read(saved(PICTURE, "PNG", icc_profile=bomb)), plain)


def test_exif_that_cannot_be_read_leaves_the_picture_as_it_is() -> None:
    for file_format in ("PNG", "WEBP"):
        data = saved(PICTURE, file_format, lossless=True, exif=b"Exif\0\0no TIFF header at all")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            with pytest.raises(SyntaxError):
                image.getexif()
        assert np.array_equal(read(data), GRADIENT)


# -- Other formats ------------------------------------------------------------------------------


def boxed(major: bytes, *compatible: bytes) -> bytes:
    content = b"ftyp" + major + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 4 + len(content)) + content + bytes(100)


OTHERS = [
    ("AVIF", saved(PICTURE, "AVIF")),
    ("AVIF", boxed(b"mif1", b"miaf", b"avif")),
    ("HEIC", boxed(b"heic", b"mif1", b"heic")),
    ("HEIC", boxed(b"mif1", b"heic")),
    ("GIF", saved(PICTURE, "GIF")),
    ("TIFF", saved(PICTURE, "TIFF")),
    ("BMP", saved(PICTURE, "BMP")),
    ("PDF", saved(PICTURE, "PDF")),
    ("JPEG XL", b"\xff\x0a" + bytes(20)),
]


@pytest.mark.parametrize(("name", "data"), OTHERS)
def test_other_formats_are_refused_by_name(name: str, data: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        read(data)
    message = f"image is a file of the format {name}; save it as JPEG, PNG or WebP"
    assert (refused.value.message, refused.value.param) == (message, "image")


@pytest.mark.parametrize("data", [b"hello", boxed(b"isom", b"mp42"), b"\x89PNG\r\n\x1a\nhello"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        read(data)
    assert refused.value.message == (
        "image cannot be read as PNG, JPEG or WebP: it is damaged or something else; save it again "
        "as one of them"
    )
