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


class Box(NamedTuple):
    """A part of a picture, in pixels; right and bottom are the first outside."""

    left: int
    top: int
    right: int
    bottom: int


class Edited(NamedTuple):
    """What an edit starts from."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    mask: np.ndarray | None  # uint8 [H, W], see `mask_of`

    @classmethod
    def of(cls, picture: Picture, mask: Picture | None = None) -> Edited:
        """Raises what `mask_of` does."""
        where = mask_of(picture, mask)
        return cls(picture.over_white() if where is None else picture.pixels, where)

    def fit(self, width: int, height: int, *, crop: bool) -> Edited:
        """In another size, see `resize`.

        Raises:
            BadRequest: the mask marks nothing of it.
        """
        mask = None if self.mask is None else resize(self.mask, width, height, crop=crop)
        if mask is not None and mask.max() < HALF:
            raise BadRequest(
                "mask leaves nothing to draw: make transparent in it what is to change",
                param="mask",
            )
        return Edited(resize(self.pixels, width, height, crop=crop), mask)

    def within(self, box: Box | None) -> Edited:
        """A part of it; None: all."""
        if box is None:
            return self
        part = np.s_[box.top : box.bottom, box.left : box.right]
        return Edited(self.pixels[part], None if self.mask is None else self.mask[part])


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


def region_of(mask: np.ndarray, width: int, height: int, padding_px: int) -> Box:
    """What surrounds all that a mask marks by ``padding_px``, in the shape of ``width:height``.

    ``mask`` uint8 ``[H, W]``. Agrees with ``VaeImageProcessor.get_crop_region`` of diffusers; where
    the picture is too narrow or too low for that shape, the region is all there is.
    """
    spans = []
    for axis in (1, 0):
        marked, limit = np.flatnonzero((mask > 0).any(axis=1 - axis)), mask.shape[axis]
        first, end = (int(marked[0]), int(marked[-1]) + 1) if len(marked) else (0, limit)
        spans.append((max(first - padding_px, 0), min(end + padding_px, limit)))
    (left, right), (top, bottom) = spans
    if (right - left) * height > width * (bottom - top):
        top, bottom = _widened(top, bottom, int((right - left) * height / width), mask.shape[0])
    else:
        left, right = _widened(left, right, int((bottom - top) * width / height), mask.shape[1])
    return Box(left, top, right, bottom)


def _widened(first: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """A span of that length around another, inside 0 to ``limit`` as far as it has room."""
    first -= (length - (end - first)) // 2
    first = max(min(first, limit - length), 0)
    return first, min(first + length, limit)


@dataclass(frozen=True, slots=True)
class Paste:
    """What an edit keeps of its image, put back over what was drawn: equal to the byte."""

    image: np.ndarray  # uint8 [H, W, 3]
    box: Box  # what was drawn of it
    share: np.ndarray  # float32 [h, w, 1] of what was drawn, in the box: 0 outside the mask

    @classmethod
    def of(cls, edited: Edited, box: Box | None = None, feather_px: int | None = None) -> Paste:
        """``edited`` with its mask. Inside that the share rises over some ``feather_px``."""
        box = box or Box(0, 0, edited.pixels.shape[1], edited.pixels.shape[0])
        where = edited.within(box).mask
        assert where is not None, "nothing else is pasted"
        mask = where >= HALF
        if feather_px is None:
            feather_px = round(min(mask.shape) * FEATHER)
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        blurred = np.asarray(grey.filter(ImageFilter.GaussianBlur(feather_px / 2)), np.float32)
        share = np.where(mask, np.clip(blurred / 127.5 - 1, 0, 1) if feather_px else 1, 0)
        return cls(edited.pixels, box, share.astype(np.float32)[..., None])

    def over(self, drawn: np.ndarray) -> np.ndarray:
        """uint8 ``[H, W, 3]``; ``drawn`` is scaled to the box."""
        height, width = self.share.shape[:2]
        drawn = resize(drawn, width, height, crop=False)
        whole = self.image.copy()
        part = whole[self.box.top : self.box.bottom, self.box.left : self.box.right]
        kept = part.astype(np.float32)
        part[:] = np.rint(kept + self.share * (drawn - kept))
        return whole
