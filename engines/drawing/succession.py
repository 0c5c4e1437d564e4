"""Which model draws now: another build of it may follow, between two engine calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from engines.backends.adapters import AdapterSet
from engines.drawing.model import Model
from engines.drawing.turnstile import Turnstile

logger = logging.getLogger("fourstep.runner")


class Succession:
    """The model that draws, and the one that is to follow it. ``changed`` is told between calls."""

    def __init__(self, model: Model, changed: Callable[[Model], None]) -> None:
        self.model = model
        self._changed = changed
        self._next: Model | None = None  # put here by any thread, taken by an engine's
        self._turnstile = Turnstile()

    def follow(self, model: Model) -> None:
        """From the next engine call on ``model`` draws. It has been tried."""
        self._next = model

    def calling(self, loras: AdapterSet | None = None) -> AbstractContextManager[None]:
        """Around every engine call: the model that is to draw now is there, with these LoRAs."""

        def is_set() -> bool:
            held = loras is None or self.model.adapters.hold(loras)
            return held and self._next is None

        def set_up() -> None:
            self._take_up()
            if loras is not None:
                self.model.adapters.switch(loras)

        return self._turnstile.enter(is_set, set_up)

    def _take_up(self) -> None:
        model, self._next = self._next, None
        if model is None:
            return
        old, self.model = self.model, model
        self._changed(model)
        old.close()
        if old.device == "cuda":
            torch.cuda.empty_cache()  # what torch keeps, TensorRT cannot use
        logger.info("%s draws from now on, %s did", model.choice.backend, old.choice.backend)

    def close(self) -> None:
        """Free the engines, of a model too that has not yet drawn."""
        self._take_up()
        self.model.close()
