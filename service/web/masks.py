"""Masks of edits: where a picture is drawn anew, and how the rest of it comes back untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from service.errors import BadRequest
from service.web.uploads import Picture, resize

HALF = 128  # of uint8: where diffusers' mask processor cuts
FEATHER = 1 / 128  # of the shorter side: 4 px of 512


class Edited(NamedTuple):
    """What an edit starts from."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    mask: np.ndarray | None  # uint8 [H, W], see `mask_of`

    @classmethod
    def of(cls, picture: Picture, mask: Picture | None = None) -> Edited:
        """Raises what `mask_of` does."""
        where = mask_of(picture, mask)
        return cls(picture.over_white() if where is None else picture.pixels, where)


def mask_of(picture: Picture, mask: Picture | None) -> np.ndarray | None:
    """Where a picture is to change, uint8 ``[H, W]``: 255 all, 0 not at all; None: everywhere.

    As OpenAI has it: where the mask is transparent or, without one, the picture itself. A mask
    without any transparency is read as diffusers' are, white for what changes.

    Raises:
        BadRequest: the mask is not of the picture's size.
    """
    if mask is None and (picture.alpha is None or picture.alpha.min() >= HALF):
        return None
    chosen = mask or picture
    rows, columns = chosen.pixels.shape[:2]
    wanted_rows, wanted_columns = picture.pixels.shape[:2]
    if (rows, columns) != (wanted_rows, wanted_columns):
        raise BadRequest(
            f"mask is {columns}x{rows} and image {wanted_columns}x{wanted_rows}; send a mask of "
            "the image's own size",
            param="mask",
        )
    if chosen.alpha is None:
        return np.asarray(Image.fromarray(chosen.pixels).convert("L"))
    return np.asarray(ImageChops.invert(Image.fromarray(chosen.alpha)))


def fit_mask(mask: np.ndarray, width: int, height: int, *, crop: bool) -> np.ndarray:
    """Where to draw anew, bool ``[height, width]``, of uint8 ``[H, W]``; see `resize`.

    Raises:
        BadRequest: nowhere.
    """
    fitted: np.ndarray = resize(mask, width, height, crop=crop) >= HALF
    if not fitted.any():
        raise BadRequest(
            "mask leaves nothing to draw: make transparent in it what is to change", param="mask"
        )
    return fitted


@dataclass(frozen=True, slots=True)
class Paste:
    """What an edit keeps of its image, put back over what was drawn: equal to the byte."""

    image: np.ndarray  # uint8 [H, W, 3]
    share: np.ndarray  # float32 [H, W, 1] of what was drawn: 0 outside the mask

    @classmethod
    def of(cls, image: np.ndarray, mask: np.ndarray, feather_px: int | None = None) -> Paste:
        """``mask`` bool ``[H, W]``; inside it the share rises over some ``feather_px``."""
        if feather_px is None:
            feather_px = round(min(mask.shape) * FEATHER)
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        blurred = np.asarray(grey.filter(ImageFilter.GaussianBlur(feather_px / 2)), np.float32)
        share = np.where(mask, np.clip(blurred / 127.5 - 1, 0, 1) if feather_px else 1, 0)
        return cls(image, share.astype(np.float32)[..., None])

    def over(self, drawn: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]``."""
        kept = self.image.astype(np.float32)
        return np.rint(kept + self.share * (drawn - kept)).astype(np.uint8)
