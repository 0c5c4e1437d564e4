"""The OpenAI-compatible endpoints: generations, edits, models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from service.batching.request import Timings
from service.errors import BadRequest, Cancelled
from service.replica import Replica
from service.web.admission import Admitted, admit, check_limits, check_model, priority_of
from service.web.events import EventStream
from service.web.images import MEDIA_TYPES, to_base64
from service.web.job import EncodedImage, Job, withheld_warnings
from service.web.parsing import accepted_format, parse_edit, parse_generation
from service.web.schema import (
    ImageParams,
    ImagesResponse,
    ModelList,
    ModelObject,
    OutputFormat,
)
from service.web.uploads import decode_image

T = TypeVar("T")


class PlainRoute(APIRoute):
    """A handler that takes the request and makes the response itself; FastAPI just documents it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def build_router(replica: Replica) -> APIRouter:
    """Routes of one replica."""
    router = APIRouter(prefix="/v1")

    async def generations(request: Request) -> Response:
        """Draw images from a prompt. `Accept: image/png|jpeg|webp` returns the raw image."""
        params = await parse_generation(request, replica.settings.max_prompt_chars)
        check_model(params.model, replica.runner.info.model_id, replica.settings)
        output_format = accepted_format(request.headers.get("accept", ""), params)
        tenant = request.state.exchange.tenant
        timeout_s = _check_room(replica, request, params)
        admitted = admit(params, replica.runner, replica.settings, tenant)
        if replica.safety is not None:
            await _in_worker(replica, replica.safety.check_prompt, params.prompt)
        return await _answer(
            replica, request, params, admitted, output_format, "image_generation", timeout_s
        )

    async def edits(request: Request) -> Response:
        """Redraw one image after a prompt (image-to-image); `strength` says how far."""
        params, data = await parse_edit(request)
        check_model(params.model, replica.runner.info.model_id, replica.settings)
        output_format = accepted_format(request.headers.get("accept", ""), params)
        max_px = replica.settings.max_input_px
        tenant = request.state.exchange.tenant
        timeout_s = _check_room(replica, request, params)

        def prepare() -> Admitted:
            pixels = decode_image(data, max_px=max_px)
            admitted = admit(params, replica.runner, replica.settings, tenant, pixels)
            if replica.safety is not None:
                replica.safety.check_prompt(params.prompt)
            return admitted

        admitted = await _in_worker(replica, prepare)
        return await _answer(
            replica, request, params, admitted, output_format, "image_edit", timeout_s
        )

    for path, endpoint in (("/images/generations", generations), ("/images/edits", edits)):
        router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=ImagesResponse,
            route_class_override=PlainRoute,
        )

    @router.get("/models")
    async def models() -> ModelList:
        """The model served here, and what may be asked of it."""
        return ModelList(data=[_model_object(replica)])

    @router.get("/models/{model_id:path}")
    async def model(model_id: str) -> ModelObject:
        """The model, by its id or an alias."""
        check_model(model_id, replica.runner.info.model_id, replica.settings)
        return _model_object(replica)

    return router


def _check_room(replica: Replica, request: Request, params: ImageParams) -> float:
    """The seconds that a request has. Raises `Overloaded` before one that will be refused has cost
    more than its parsing.
    """
    check_limits(params, replica.settings)
    tenant = request.state.exchange.tenant
    timeout_s = _timeout_s(request, replica.settings.request_timeout_s)
    replica.loop.check(params.n, tenant.name, priority_of(params, tenant), timeout_s)
    return timeout_s


async def _in_worker(replica: Replica, work: Callable[..., T], *arguments: object) -> T:
    """What blocks runs beside the event loop, where images are encoded too."""
    event_loop = asyncio.get_running_loop()
    return await event_loop.run_in_executor(replica.image_workers, work, *arguments)


def _model_object(replica: Replica) -> ModelObject:
    info, settings = replica.runner.info, replica.settings
    details = {
        "engine": info.backend,
        "engine_reason": info.backend_reason,
        "precision": info.precision,
        "components": dict(info.components),
        "aliases": list(settings.aliases),
        "default_size": f"{info.default_width}x{info.default_height}",
        "size_multiple_px": info.size_multiple,
        "min_size_px": info.min_size_px,
        "max_size_px": info.max_size_px,
        "default_num_inference_steps": info.default_num_steps,
        "max_num_inference_steps": settings.max_steps,
        "default_guidance_scale": info.default_guidance_scale,
        "guidance_embedding": info.guidance_embedding,
        "scheduler": info.scheduler,
        "default_sampler": info.default_sampler,
        "default_sampler_stands_in": info.stands_in,
        "samplers": list(info.samplers),
        "loras": list(info.loras),
        "default_loras": settings.default_loras,
        "max_prompt_tokens": info.max_tokens,
        "max_images": settings.max_images,
    }
    return ModelObject(id=info.model_id, created=replica.created, details=details)


async def _answer(
    replica: Replica,
    request: Request,
    params: ImageParams,
    admitted: Admitted,
    raw_format: OutputFormat | None,
    event_name: str,
    timeout_s: float,
) -> Response:
    exchange = request.state.exchange
    job = Job(
        replica,
        params,
        admitted,
        request_id=exchange.request_id,
        tenant=exchange.tenant,
        output_format=raw_format or params.output_format,
        timeout_s=timeout_s,
    )
    job.request.timings.parse_s = time.perf_counter() - exchange.begun
    if exchange.trace is not None:
        exchange.trace.follow(job.request, replica.loop.clock, replica.runner.info.model_id)
    if params.stream:
        await job.__aenter__()  # refused here, before the stream begins, or left to its end
        return EventStream(job, params, admitted, event_name, exchange)
    async with job:
        images = await _until_disconnect(request, _collect(job))
    timings = job.request.timings
    exchange.log_fields |= {"n": len(images), "steps": admitted.num_steps} | timings.milliseconds()
    headers = {"server-timing": _server_timing(timings)}
    if raw_format is not None:
        headers |= {"x-fourstep-seed": str(admitted.seed)}
        if admitted.warnings:
            headers["x-fourstep-warnings"] = (
                "; ".join(admitted.warnings).encode("ascii", "replace").decode()
            )
        return Response(images[0].data, media_type=MEDIA_TYPES[raw_format], headers=headers)
    content = orjson.dumps(_images_response(replica, params, admitted, images, timings))
    return Response(content, media_type="application/json", headers=headers)


def _timeout_s(request: Request, limit_s: float) -> float:
    given = request.headers.get("x-request-timeout")
    if given is None:
        return limit_s
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= limit_s:
        raise BadRequest(
            f"X-Request-Timeout is {given!r}; it must be seconds above 0 and at most {limit_s:g}",
            param="X-Request-Timeout",
        )
    return seconds


async def _collect(job: Job) -> list[EncodedImage]:
    images = [item async for item in job.items() if item.preview_index is None]
    return sorted(images, key=lambda image: image.row_index)


async def _until_disconnect(
    request: Request, work: Coroutine[Any, Any, list[EncodedImage]]
) -> list[EncodedImage]:
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


def _images_response(
    replica: Replica,
    params: ImageParams,
    admitted: Admitted,
    images: list[EncodedImage],
    timings: Timings,
) -> dict[str, Any]:
    return {
        "created": int(time.time()),
        "data": [
            _payload(image.data, params)
            | {"seed": admitted.seed + image.row_index}
            | ({"filtered": True} if image.filtered else {})
            for image in images
        ],
        "model": replica.runner.info.model_id,
        "size": f"{admitted.width}x{admitted.height}",
        "quality": params.quality,
        "background": "opaque",
        "output_format": params.output_format,
        "num_inference_steps": admitted.num_steps,
        "guidance_scale": admitted.guidance_scale,
        "sampler": admitted.sampler,
        "loras": dict(admitted.loras),
        "timings": timings.milliseconds(),
        "warnings": admitted.warnings + withheld_warnings(images),
    }


def _payload(data: bytes, params: ImageParams) -> dict[str, str]:
    if params.response_format == "url":
        return {"url": f"data:{MEDIA_TYPES[params.output_format]};base64,{to_base64(data)}"}
    return {"b64_json": to_base64(data)}


def _server_timing(timings: Timings) -> str:
    """The ``Server-Timing`` header: browsers draw it in their network panel."""
    return ", ".join(
        f"{name.removesuffix('_ms')};dur={value:g}"
        for name, value in timings.milliseconds().items()
    )
