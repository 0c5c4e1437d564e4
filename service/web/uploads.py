"""Files to pixels: how uploads are decoded. Runs in worker threads.

Uploads are hostile until proven otherwise: only PNG, JPEG and WebP are opened, dimensions are
checked before a pixel is decoded, and every failure of the decoder is a 400.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps, UnidentifiedImageError

from service.errors import BadRequest, ServiceError, TooLarge
from service.web import jpeg
from service.web.icc import to_srgb
from service.web.images import PNG_SIGNATURE

FORMATS = ("PNG", "JPEG", "WEBP")
OTHER_FORMATS = {  # how a file begins → what it is
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"%PDF": "PDF",
}
AVIF_BRANDS = {b"avif", b"avis"}  # of ISO/IEC 14496-12 files, in their first box
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
MAX_PNG_CHUNKS = 2**16  # 20 MB are 2,560 of libpng's 8 KiB; Pillow takes 4 µs for each
EXIF_TURNS = {  # Exif 2.3, 4.6.4 A: the value of Orientation → what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Picture(NamedTuple):
    """A decoded upload, upright and in sRGB."""

    pixels: np.ndarray  # uint8 [H, W, 3], also beneath what is transparent
    alpha: np.ndarray | None  # uint8 [H, W], where the file has transparency

    def over_white(self) -> np.ndarray:
        """uint8 ``[H, W, 3]``: what is transparent is white."""
        if self.alpha is None:
            return self.pixels
        image = Image.fromarray(self.pixels)
        image.paste("white", mask=ImageChops.invert(Image.fromarray(self.alpha)))
        return np.asarray(image)


def decode_picture(data: bytes, *, max_px: int, field: str = "image") -> Picture:
    """Decode an upload: turned upright (Exif), in sRGB; of 16 bits the upper 8, of several
    pictures the first.

    Damaged Exif and colour profiles are passed over. Working memory is at most 17 bytes a pixel.

    Raises:
        BadRequest: empty, damaged, or not PNG, JPEG or WebP.
        TooLarge: more than ``max_px`` pixels, judged before decoding.
    """
    if not data:
        raise BadRequest(f"{field} is empty; send a PNG, JPEG or WebP file", param=field)
    if other := _other_format(data):
        raise BadRequest(
            f"{field} is a file of the format {other}; save it as JPEG, PNG or WebP", param=field
        )
    if data.startswith(jpeg.SIGNATURE):
        data = jpeg.first_image(data, field=field)
    elif data.startswith(PNG_SIGNATURE):
        _check_chunks(data, field)
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # Pillow's doubts about a file; max_px is our bound
            width, height = image.size
            if width * height > max_px:
                raise TooLarge(
                    f"{field} is {width}x{height} = {width * height} pixels; at most {max_px} are "
                    "accepted, scale it down first",
                    param=field,
                )
            return _picture(_upright(image))
    except ServiceError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{field} has too many pixels: {error}", param=field) from error
    except UnidentifiedImageError as error:
        raise BadRequest(
            f"{field} cannot be read as PNG, JPEG or WebP: it is damaged or something else; save "
            "it again as one of them",
            param=field,
        ) from error
    except Exception as error:  # damaged files raise anything, from struct.error to KeyError
        raise BadRequest(
            f"{field} cannot be read as PNG, JPEG or WebP: {str(error)[:200]}", param=field
        ) from error


def _other_format(data: bytes) -> str | None:
    """What a file is that would have to be saved as another."""
    if data[4:8] == b"ftyp":  # size, type, major brand, version, compatible brands
        end = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
        if brands & AVIF_BRANDS:  # these files name a HEIC brand as well
            return "AVIF"
        return "HEIC" if brands & HEIC_BRANDS else None
    return next((name for head, name in OTHER_FORMATS.items() if data.startswith(head)), None)


def _check_chunks(data: bytes, field: str) -> None:
    """Of a PNG, up to its last: a length, a name, what it holds, a checksum."""
    at, num_chunks = len(PNG_SIGNATURE), 0
    while at < len(data) and data[at + 4 : at + 8] != b"IEND":
        num_chunks += 1
        if num_chunks > MAX_PNG_CHUNKS:
            raise BadRequest(
                f"{field} has more than {MAX_PNG_CHUNKS} PNG chunks, which is all that is read; "
                "save it again",
                param=field,
            )
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its Exif orientation says; Pillow's own function would also write Exif anew."""
    image.load()
    try:
        turn = EXIF_TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged Exif raises anything, and the picture is none the worse
        return image
    return image if turn is None else image.transpose(turn)


def _picture(image: Image.Image) -> Picture:
    profile = image.info.get("icc_profile")
    if image.mode == "I;16":
        return Picture(np.asarray(to_srgb(_upper_bits(image), profile)), None)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    pixels = np.asarray(to_srgb(image.convert(mode), profile))
    return Picture(pixels, None if alpha is None else np.asarray(alpha))


def _upper_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits; the one value that may be transparent there is white."""
    samples = np.asarray(image)  # uint16 [H, W]
    upper = (samples >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # compared with None it would be 16 million times, in Python
        np.copyto(upper, 2**8 - 1, where=samples == clear)
    return Image.fromarray(upper)


def resize(pixels: np.ndarray, width: int, height: int, *, crop: bool) -> np.ndarray:
    """Fit uint8 ``[H, W, 3]`` or ``[H, W]`` to ``width`` × ``height`` by Lanczos.

    All of it, stretched where its shape is another; with ``crop`` its centre of that shape.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    image, size = Image.fromarray(pixels), (width, height)
    lanczos = Image.Resampling.LANCZOS
    return np.asarray(ImageOps.fit(image, size, lanczos) if crop else image.resize(size, lanczos))


def describe_resize(pixels: np.ndarray, width: int, height: int, *, crop: bool) -> str | None:
    """What `resize` does to uint8 ``[H, W, 3]``, for the client; None where that is nothing."""
    rows, columns, _ = pixels.shape
    if (rows, columns) == (height, width):
        return None
    scale = max(width / columns, height / rows)
    kept = f"{round(width / scale)}x{round(height / scale)}"
    if crop and kept != f"{columns}x{rows}":
        return (
            f"image is {columns}x{rows}, not of the shape of {width}x{height}: its centre, {kept}, "
            "was drawn from; with size 'auto' all of it is"
        )
    stretch = width * rows / (height * columns)
    loss, way = (1 - stretch, "narrower") if stretch < 1 else (1 - 1 / stretch, "lower")
    done = f"image is {columns}x{rows}: all of it was scaled to {width}x{height}"
    if loss >= 0.001:
        done += f", {100 * loss:.1f} % {way} than its shape"
    return f"{done}; crop it first to keep that" if loss >= 0.1 else done
