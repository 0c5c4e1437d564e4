"""From admitted drawings to the answer: JSON, the bare image, or a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response

from service.access.keys import IMAGE_FILES
from service.batching.request import Timings
from service.errors import BadRequest, Cancelled
from service.replica import Replica
from service.settings import MIN_TIMEOUT_S
from service.web.admission import Admitted
from service.web.events import EventStream
from service.web.image_cache import CachedRows, ImageCache, image_keys
from service.web.image_files import ImageFiles
from service.web.images import MEDIA_TYPES, to_base64
from service.web.job import AsImages, EncodedImage, Job, flags, withheld_warnings
from service.web.schema import ImageParams

T = TypeVar("T")

NOT_KEPT = (
    "response_format is 'url' and the image could not be kept as a file: the URL is a `data:` one"
)


class Answers:
    """What the drawing endpoints share: how a job is run and told of.

    Without ``files`` a `url` is a ``data:`` URL; without ``cache`` every image is drawn.
    """

    def __init__(
        self, replica: Replica, files: ImageFiles | None, cache: ImageCache | None
    ) -> None:
        self._replica = replica
        self._files = files
        self._cache = cache

    def may_be_cached(self, params: ImageParams) -> bool:
        """Whether its images are looked up, and kept, in the cache."""
        previews = params.stream and params.partial_images
        return self._cache is not None and params.seed is not None and not previews

    async def answer(
        self,
        request: Request,
        params: ImageParams,
        admitted: Admitted,
        raw: bool,
        event_name: str,
        deadline: float,
    ) -> Response:
        """Draw by ``deadline`` (the engine loop's clock) and send what was asked for: the bare
        image if ``raw``.

        Raises:
            ServiceError: nothing was accepted, or the request did not end with its images.
        """
        exchange = request.state.exchange
        if self._replica.safety is not None:
            await in_worker(self._replica, self._replica.safety.check_prompt, params.prompt)
        job = Job(
            self._replica,
            admitted,
            AsImages(params, admitted, self._replica),
            request_id=exchange.request_id,
            tenant=exchange.tenant,
            deadline=deadline,
            cached_rows=await self._cached_rows(params, admitted),
        )
        job.request.timings.parse_s = time.perf_counter() - exchange.begun
        if exchange.trace is not None and job.request.rows:
            exchange.trace.follow(
                job.request, self._replica.loop.clock, self._replica.runner.info.model_id
            )
        if params.stream:
            await job.__aenter__()  # refused here, before the stream begins, or left to its end
            return EventStream(job, params, admitted, event_name, exchange)
        async with job:
            images = await until_disconnect(request, _collect(job))
        timings = job.request.timings
        fields = {"n": len(images), "steps": admitted.num_steps}
        exchange.log_fields |= fields | timings.milliseconds()
        headers = {"server-timing": server_timing(timings)}
        if raw:
            headers |= raw_headers(admitted)
            headers |= {f"x-fourstep-{name}": "true" for name in flags(images[0])}
            media_type = MEDIA_TYPES[params.output_format]
            return Response(images[0].data, media_type=media_type, headers=headers)
        content = await self._body(request, params, admitted, images, timings)
        return Response(orjson.dumps(content), media_type="application/json", headers=headers)

    async def _cached_rows(self, params: ImageParams, admitted: Admitted) -> CachedRows | None:
        if self._cache is None or not self.may_be_cached(params):
            return None
        recipes = [drawing.recipe for drawing in admitted.drawings]
        keys = await in_worker(
            self._replica, image_keys, recipes, admitted.paste, params, self._replica.runner.info
        )
        return CachedRows(self._cache, keys)

    async def _body(
        self,
        request: Request,
        params: ImageParams,
        admitted: Admitted,
        images: list[EncodedImage],
        timings: Timings,
    ) -> dict[str, Any]:
        warnings = admitted.warnings + withheld_warnings(images)
        if params.response_format == "url":
            places = await in_worker(self._replica, self._urls, request, params, images)
            if self._files is not None and any(each["url"].startswith("data:") for each in places):
                warnings.append(NOT_KEPT)
        else:
            places = [{"b64_json": to_base64(image.data)} for image in images]
        return {
            "created": int(time.time()),
            "data": [
                place | {"seed": admitted.seed + image.row_index} | flags(image)
                for place, image in zip(places, images, strict=True)
            ],
            "model": self._replica.runner.info.model_id,
            "size": admitted.size,
            "quality": params.quality,
            "background": "opaque",
            "output_format": params.output_format,
            "num_inference_steps": admitted.num_steps,
            "timesteps": admitted.timesteps,
            "guidance_scale": admitted.guidance_scale,
            "sampler": admitted.sampler,
            "decoder": admitted.decoder,
            "loras": dict(admitted.loras),
            "timings": timings.milliseconds(),
            "warnings": warnings,
        }

    def _urls(
        self, request: Request, params: ImageParams, images: list[EncodedImage]
    ) -> list[dict[str, str]]:
        """Keep the images; one that cannot be kept is its own URL."""
        # Its scheme is the client's as far as uvicorn trusts the proxy that says so.
        base = self._replica.settings.public_url or str(request.base_url).rstrip("/")
        urls = []
        for image in images:
            name = self._files and self._files.keep(image.data, params.output_format)
            urls.append({"url": f"{base}{IMAGE_FILES}{name}" if name else _data_url(image, params)})
        return urls


def _data_url(image: EncodedImage, params: ImageParams) -> str:
    return f"data:{MEDIA_TYPES[params.output_format]};base64,{to_base64(image.data)}"


async def in_worker(replica: Replica, work: Callable[..., T], *arguments: object) -> T:
    """What blocks runs beside the event loop, where images are encoded too."""
    event_loop = asyncio.get_running_loop()
    return await event_loop.run_in_executor(replica.image_workers, work, *arguments)


def given_timeout_s(request: Request, limit_s: float) -> float:
    """Seconds the request may take: ``X-Request-Timeout``, or ``limit_s``.

    Raises:
        BadRequest: it is no number of seconds, or out of the bounds.
    """
    given = request.headers.get("x-request-timeout")
    if given is None:
        return limit_s
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not MIN_TIMEOUT_S <= seconds <= limit_s:
        raise BadRequest(
            f"X-Request-Timeout is {given[:80]!r}; it must be seconds from {MIN_TIMEOUT_S:g}, "
            f"which no image takes less than, to {limit_s:g}",
            param="X-Request-Timeout",
        )
    return seconds


async def _collect(job: Job) -> list[EncodedImage]:
    images = [item async for item in job.items() if item.preview_index is None]
    return sorted(images, key=lambda image: image.row_index)


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; a client that closes its connection cancels it.

    Servers only say ``http.disconnect``; Ray Serve, without HAProxy, cancels the handler itself.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and gone.result()["type"] == "http.disconnect":
            raise Cancelled("the client closed the connection")
        return await task
    finally:
        gone.cancel()
        task.cancel()


def raw_headers(admitted: Admitted) -> dict[str, str]:
    """What a bare image or clip cannot say itself."""
    headers = {"x-fourstep-seed": str(admitted.seed)}
    if admitted.warnings:
        warnings = "; ".join(admitted.warnings)
        headers["x-fourstep-warnings"] = warnings.encode("ascii", "replace").decode()
    return headers


def server_timing(timings: Timings) -> str:
    """The ``Server-Timing`` header: browsers draw it in their network panel."""
    return ", ".join(
        f"{name.removesuffix('_ms')};dur={value:g}"
        for name, value in timings.milliseconds().items()
    )
