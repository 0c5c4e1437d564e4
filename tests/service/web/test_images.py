"""Every PNG level is lossless and carries its text, as Pillow reads it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from service.settings import Settings
from service.web import images
from service.web.images import encode_image

TEXT = {"parameters": "a red star\nSteps: 4", "note": "größer, 星"}


def picture(height: int, width: int) -> np.ndarray:
    """Noise beside a flat field: every filter and every byte value occurs."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[:, width // 2 :] = (250, 3, 128)
    return pixels


@pytest.mark.parametrize("level", range(10))
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (128, 96), (200, 512)])
def test_png_is_lossless_at_every_level(level: int, height: int, width: int) -> None:
    pixels = picture(height, width)
    data = encode_image(pixels, "png", Settings(png_level=level), text=TEXT)
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # verifies every checksum
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels)
        assert image.text == TEXT  # type: ignore[attr-defined]


def test_png_in_stripes_is_lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(513, 515)
    files = set()
    for count in (1, 3, 4):
        monkeypatch.setattr(images, "MAX_STRIPES", count)
        data = encode_image(pixels, "png", Settings())
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert np.array_equal(np.asarray(image), pixels)
        files.add(data)
    assert len(files) == 3  # so that they were really made so


def test_the_default_level_is_no_larger_than_zlibs_own_on_a_photograph() -> None:
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((3, 256, 256))) / frequency**1.3  # a photograph's
    field = np.fft.irfft2(spectrum).transpose(1, 2, 0)
    pixels = np.rint(255 * (field - field.min()) / np.ptp(field)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    assert len(encode_image(pixels, "png", Settings())) <= len(buffer.getvalue())
