"""What was drawn as a file: a picture as PNG, a clip in a format that moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from engines.errors import InvalidInput

FORMATS = {".webp": "WEBP", ".gif": "GIF"}  # of clips, by the file's ending
WEBP_QUALITY = 90


def check_name(path: Path, frames_per_second: int) -> None:
    """Raise InvalidInput where a clip cannot be written to a file of that name."""
    if frames_per_second and path.suffix.lower() not in FORMATS:
        raise InvalidInput(
            "out", path.name, f"--out is {path.name}; the model draws clips, name it .webp or .gif"
        )


def save(pixels: np.ndarray, path: Path, frames_per_second: int) -> None:
    """Write uint8 ``[H, W, 3]`` as PNG, or ``[F, H, W, 3]`` as a clip; the file appears whole.

    A GIF counts time in hundredths of a second, as it does, and comes to 8.3 frames a second for 8.
    """
    partial = path.with_name(f".{path.name}.partial")
    if pixels.ndim == 3:
        Image.fromarray(pixels).save(partial, "PNG")
    else:
        first, *rest = (Image.fromarray(frame) for frame in pixels)
        first.save(
            partial,
            FORMATS[path.suffix.lower()],
            save_all=True,
            append_images=rest,
            duration=round(1000 / frames_per_second),
            loop=0,
            quality=WEBP_QUALITY,
        )
    partial.replace(path)
