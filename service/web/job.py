"""From admitted drawings to encoded images: one request's way through the engine loop.

A handler submits, then reads items as they come. If the handler is cancelled (its client went
away), leaving the job frees the request's rows at the next step boundary.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np

from service.access.quota import Tenant
from service.access.safety import PolicyViolation
from service.batching.request import Event, Finished, Preview, Request, Resolved, Row, StageRecord
from service.errors import Cancelled, DeadlineExceeded, NotReady, ServiceError
from service.replica import Replica
from service.web.admission import Admitted
from service.web.image_cache import CachedRows
from service.web.images import encode_image
from service.web.schema import ImageParams

DEADLINE_GRACE_S = 1.0  # the engine loop itself is first to say that a deadline has passed


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A file ready to send. ``preview_index`` is None for a final image.

    ``filtered``: the safety filter withheld it, and ``data`` is a black picture in its place.
    ``cached``: it was drawn for an earlier request.
    """

    row_index: int
    preview_index: int | None
    data: bytes
    filtered: bool = False
    cached: bool = False


class Encoding(Protocol):
    """How what is drawn for a request becomes files. Called in workers."""

    def encode(self, pixels: np.ndarray, row_index: int, *, final: bool) -> bytes:
        """A file of uint8 ``[H, W, 3]``, of a model of clips ``[F, H, W, 3]``."""

    def count(self, encode_s: float | None) -> None:
        """One has been made for delivery; None: for an earlier request."""


class Job:
    """One accepted request as its handler sees it. Use as an async context manager.

    What ``cached_rows`` has is not drawn; with all of them nothing is submitted to the engine.

    ``deadline`` is on the engine loop's clock; a ``live`` job gives way to others. Raises on entry
    what `Quotas.take` and `EngineLoop.submit` raise: nothing was accepted then.
    """

    def __init__(
        self,
        replica: Replica,
        admitted: Admitted,
        encoding: Encoding,
        *,
        request_id: str,
        tenant: Tenant,
        deadline: float,
        cached_rows: CachedRows | None = None,
        live: bool = False,
    ) -> None:
        self._replica = replica
        self._admitted = admitted
        self._encoding = encoding
        self._tenant = tenant
        self._mailbox = replica.mailbox()
        self._inbox: asyncio.Queue[Future[EncodedImage] | Resolved] = asyncio.Queue()
        self._cached_rows = cached_rows
        self._cached = [
            EncodedImage(index, None, data, cached=True)
            for index in range(len(admitted.drawings))
            if cached_rows is not None and (data := cached_rows.get(index)) is not None
        ]
        now = replica.loop.clock()
        self.request = Request(
            request_id,
            arrived_at=now,
            deadline=deadline,
            send=self._receive,
            tenant=tenant.name,
            priority=admitted.priority,
            live=live,
        )
        found = {image.row_index for image in self._cached}
        self.request.rows = [
            Row(self.request, index, drawing)
            for index, drawing in enumerate(admitted.drawings)
            if index not in found
        ]

    async def __aenter__(self) -> Job:
        quotas, num_images = self._replica.quotas, self._admitted.num_images
        quotas.take(self._tenant, num_images)  # cached images count: what a key gets is bounded
        try:
            if self.request.rows:
                self._replica.loop.submit(self.request)
        except ServiceError:
            quotas.refund(self._tenant, num_images)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._replica.loop.cancel(self.request)  # no effect once it is resolved
        superseded = self.request.live and isinstance(error, Cancelled)  # by us: it costs nothing
        quotas = self._replica.quotas
        end = quotas.refund if superseded else quotas.give_back
        end(self._tenant, self._admitted.num_images)

    async def items(self) -> AsyncIterator[EncodedImage]:
        """Previews and images, each as soon as it is encoded.

        A filtered preview is left out. A filtered image waits for one that is not: black pictures
        stand in for the rest of an answer, and alone they would be none.

        Raises:
            PolicyViolation: the safety filter withheld every image.
            ServiceError: the request ended any other way than with all its images.
        """
        withheld: list[EncodedImage] = []
        any_passed, any_previewed = bool(self._cached), False
        for image in self._cached:
            self._encoding.count(None)
            yield image
        while not isinstance(item := await self._next(), Resolved):
            image = await asyncio.wrap_future(item)
            if not image.filtered:
                any_passed |= image.preview_index is None
                if image.preview_index is not None and not any_previewed:
                    any_previewed = True
                    waited_s = self._replica.loop.clock() - self.request.arrived_at
                    self._replica.metrics.first_preview(waited_s)
                yield image
            elif image.preview_index is None:
                withheld.append(image)
            if any_passed:
                for each in withheld:
                    yield each
                withheld.clear()
        if item.error is not None:
            raise item.error
        if withheld:
            raise PolicyViolation(
                "the safety filter withheld what was drawn; try another prompt or seed"
            )
        self.request.timings.total_s = self._replica.loop.clock() - self.request.arrived_at

    async def _next(self) -> Future[EncodedImage] | Resolved:
        """The next item; a wedged engine, which cannot see deadlines, leaves nobody waiting."""
        if not self.request.rows:
            return Resolved(None)
        left_s = self.request.deadline - self._replica.loop.clock() + DEADLINE_GRACE_S
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                return await self._inbox.get()
        except TimeoutError:
            raise DeadlineExceeded(
                "the engine has not answered by the deadline; try again"
            ) from None

    def _receive(self, event: Event) -> None:
        """Called on an engine thread, which this must not hold up."""
        self._mailbox.put(functools.partial(self._take, event))

    def _take(self, event: Event) -> None:
        """On the event loop: encoding begins at once, not when the handler next runs."""
        if isinstance(event, Resolved):
            self._inbox.put_nowait(event)
            return
        try:
            image = self._replica.image_workers.submit(self._encode, event)
        except RuntimeError:  # the replica is closed
            error = NotReady("this replica is shutting down; try again", retry_after_s=1)
            self._inbox.put_nowait(Resolved(error))
        else:
            self._inbox.put_nowait(image)

    def _encode(self, event: Preview | Finished) -> EncodedImage:
        final = isinstance(event, Finished)
        pixels, filtered = event.pixels, False
        if self._admitted.paste is not None:
            pixels = self._admitted.paste.over(pixels)
        if self._replica.safety is not None:
            pixels, filtered = self._replica.safety.screen(pixels, "image" if final else "preview")
        begun = self._replica.loop.clock()
        data = self._encoding.encode(pixels, event.row_index, final=final)
        seconds = self._replica.loop.clock() - begun
        self.request.timings.image_encode_s += seconds
        if self.request.records is not None:
            self.request.records.append(StageRecord("image_encode", begun, seconds))
        if final and not filtered:
            self._encoding.count(seconds)
            if self._cached_rows is not None:
                self._cached_rows.put(event.row_index, data)
        preview_index = event.preview_index if isinstance(event, Preview) else None
        return EncodedImage(event.row_index, preview_index, data, filtered)


class AsImages:
    """The `Encoding` of a request for images."""

    def __init__(self, params: ImageParams, admitted: Admitted, replica: Replica) -> None:
        self._params, self._admitted, self._replica = params, admitted, replica

    def encode(self, pixels: np.ndarray, row_index: int, *, final: bool) -> bytes:
        text = parameters_text(self._params, self._admitted, row_index, self._replica)
        return encode_image(
            pixels[0] if pixels.ndim == 4 else pixels,  # a clip of one frame is an image
            self._params.output_format,
            self._replica.settings,
            quality=self._params.output_compression,
            text=text if final else None,
        )

    def count(self, encode_s: float | None) -> None:
        self._replica.metrics.image(self._admitted.width, self._admitted.height, encode_s)


def flags(image: EncodedImage) -> dict[str, bool]:
    """What an answer says of an image that is not as any other."""
    told = {"filtered": image.filtered, "cached": image.cached}
    return {name: True for name, holds in told.items() if holds}


def withheld_warnings(images: Sequence[EncodedImage]) -> list[str]:
    """A warning where the safety filter put a black picture in an image's place."""
    indices = ", ".join(str(image.row_index) for image in images if image.filtered)
    return [f"the safety filter withheld image {indices} (from 0): it is black"] if indices else []


def parameters_text(
    params: ImageParams, admitted: Admitted, row_index: int, replica: Replica
) -> dict[str, str]:
    """PNG text chunks in the form that image viewers of the field read: one ``parameters`` key."""
    negative = f"Negative prompt: {params.negative_prompt}\n" if params.negative_prompt else ""
    settings = ", ".join(
        f"{name}: {value}"
        for name, value in {
            "Steps": admitted.num_steps,
            **({"Timesteps": _quoted(admitted.timesteps)} if admitted.timesteps else {}),
            "Sampler": admitted.sampler,
            **({"Decoder": admitted.decoder} if admitted.decoder != "full" else {}),
            **({"LoRAs": _quoted(_weighted(admitted.loras))} if admitted.loras else {}),
            "CFG scale": admitted.guidance_scale,
            "Seed": admitted.seed + row_index,
            "Size": admitted.size,
            **_told_sizes(params),
            "Model": replica.runner.info.model_id,
        }.items()
    )
    return {"parameters": f"{params.prompt}\n{negative}{settings}", "Software": "Fourstep"}


def _told_sizes(params: ImageParams) -> dict[str, str]:
    """The size conditioning that was asked for."""
    top_left = params.crops_coords_top_left
    told = {
        "Original size": params.original_size,
        "Crops coords top left": None if top_left is None else _quoted(top_left),
        "Target size": params.target_size,
    }
    return {name: value for name, value in told.items() if value is not None}


def _weighted(loras: Mapping[str, float]) -> list[str]:
    return [f"{name}: {weight:g}" for name, weight in sorted(loras.items())]


def _quoted(values: Iterable[object]) -> str:
    return f'"{", ".join(map(str, values))}"'  # readers of this text split it at commas
