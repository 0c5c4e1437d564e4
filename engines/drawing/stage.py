"""Where a row stands between its prompt and its pixels. Imports nothing: the scheduler reads it."""

import enum


class Stage(enum.IntEnum):
    """What a row needs next, in the order in which rows pass through."""

    ENCODE_TEXT = 0
    ENCODE_IMAGE = 1
    DENOISE = 2
    PREVIEW = 3
    DECODE = 4
    DONE = 5
