"""Where an edit starts: its image and mask in the size that is drawn; what comes back over it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from service.web.masks import HALF, Edited, Paste, region_of
from service.web.schema import DrawParams, EditParams
from service.web.uploads import describe_resize

DEFAULT_STRENGTH = 0.8  # without a mask


class Start(NamedTuple):
    """What all rows of a request start from: by default noise alone."""

    image: np.ndarray | None = None  # uint8 [H, W, 3]
    mask: np.ndarray | None = None  # bool [H, W]
    strength: float = 1.0
    paste: Paste | None = None  # over each image, once drawn
    warning: str | None = None  # where the image lost its shape or its edges


def start_of(params: DrawParams, edited: Edited | None, width: int, height: int) -> Start:
    """``edited``, as it was sent, brought to ``width`` × ``height``.

    Raises:
        BadRequest: nothing of it is marked for drawing.
    """
    if edited is None or not isinstance(params, EditParams):
        return Start()
    crop = params.size != "auto"
    if edited.mask is not None and params.padding_mask_crop is not None:
        box = region_of(edited.mask, width, height, params.padding_mask_crop)
        pasted, fitted = edited, edited.within(box).fit(width, height, crop=False)
        warning = None  # all of the image comes back as it was sent
    else:
        box = None
        pasted = fitted = edited.fit(width, height, crop=crop)
        warning = describe_resize(edited.pixels, width, height, crop=crop)
    if fitted.mask is None:
        return Start(fitted.pixels, None, params.strength or DEFAULT_STRENGTH, None, warning)
    paste = Paste.of(pasted, box, params.mask_feather) if params.paste_back else None
    return Start(fitted.pixels, fitted.mask >= HALF, params.strength or 1.0, paste, warning)
