"""Encoded images of earlier requests, for requests that are equal to the last bit.

In this replica's memory, which holds one model: only what the replica has drawn itself, and its
safety filter let through, is ever in here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from service.web.images import DEFAULT_QUALITY

if TYPE_CHECKING:
    from engines.drawing.info import ModelInfo
    from engines.families.recipe import Recipe
    from service.web.masks import Paste
    from service.web.schema import ImageParams


class ImageCache:
    """Encoded images by what makes them, least recently used first out. Thread-safe.

    ``max_bytes`` bounds the images; ``observe_lookup`` is told of each lookup whether it hit,
    ``observe_bytes`` how many bytes there are after each change.
    """

    def __init__(
        self,
        max_bytes: int,
        observe_lookup: Callable[[bool], None] = lambda hit: None,
        observe_bytes: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._images: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._observe_lookup, self._observe_bytes = observe_lookup, observe_bytes

    def get(self, key: bytes) -> bytes | None:
        with self._lock:
            data = self._images.get(key)
            if data is not None:
                self._images.move_to_end(key)
        self._observe_lookup(data is not None)
        return data

    def put(self, key: bytes, data: bytes) -> None:
        if len(data) > self._max_bytes:
            return
        with self._lock:
            self._num_bytes += len(data) - len(self._images.pop(key, b""))
            self._images[key] = data
            while self._num_bytes > self._max_bytes:
                _, dropped = self._images.popitem(last=False)
                self._num_bytes -= len(dropped)
            self._observe_bytes(self._num_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class CachedRows:
    """The cache as one request sees it: its images by row index."""

    cache: ImageCache
    keys: Sequence[bytes]

    def get(self, row_index: int) -> bytes | None:
        return self.cache.get(self.keys[row_index])

    def put(self, row_index: int, data: bytes) -> None:
        self.cache.put(self.keys[row_index], data)


def image_keys(
    recipes: Sequence[Recipe], paste: Paste | None, params: ImageParams, model: ModelInfo
) -> list[bytes]:
    """SHA-256 of all that decides an encoded image's bytes, for each recipe of one request.

    What changes while a replica serves is the engine that draws (``serve_meanwhile``): it counts.
    Weights and LoRA files are read once, at start.
    """
    arrays = [recipes[0].image, recipes[0].mask]
    if paste is not None:
        arrays += [paste.share, None if paste.image is recipes[0].image else paste.image]
    edited = [None if each is None else hashlib.sha256(each.tobytes()).digest() for each in arrays]
    quality = params.output_compression
    encoding = (params.output_format, DEFAULT_QUALITY if quality is None else quality)
    common = (edited, paste and paste.box, encoding, model.model_id, model.backend, model.precision)
    return [hashlib.sha256(repr((_drawn(recipe), *common)).encode()).digest() for recipe in recipes]


def _drawn(recipe: Recipe) -> list[object]:
    """Every field but image and mask, which all recipes of a request share, and the previews."""
    values = {each.name: getattr(recipe, each.name) for each in dataclasses.fields(recipe)}
    del values["image"], values["mask"], values["num_previews"]
    return [*(values | {"loras": sorted(recipe.loras.items())}).items()]
