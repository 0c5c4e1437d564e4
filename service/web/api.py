"""The OpenAI-compatible endpoints: generations, edits, models."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from service.access.keys import IMAGE_FILES
from service.errors import NotFound
from service.replica import Replica
from service.web.admission import Admitted, admit, check_limits, check_model, priority_of
from service.web.answers import Answers, given_timeout_s, in_worker
from service.web.image_files import ImageFiles
from service.web.parsing import accepted_format, parse_edit, parse_generation
from service.web.schema import ImageParams, ImagesResponse, ModelList, ModelObject
from service.web.uploads import decode_image


class PlainRoute(APIRoute):
    """A handler that takes the request and makes the response itself; FastAPI just documents it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def build_router(replica: Replica, answers: Answers, files: ImageFiles | None) -> APIRouter:
    """Routes of one replica; ``files`` are those that ``answers`` names by URL, if any."""
    router = APIRouter(prefix="/v1")

    async def generations(request: Request) -> Response:
        """Draw images from a prompt. `Accept: image/png|jpeg|webp` returns the raw image."""
        params = await parse_generation(request, replica.settings)
        check_model(params.model, replica.runner.info.model_id, replica.settings)
        output_format = accepted_format(request.headers.get("accept", ""), params)
        tenant = request.state.exchange.tenant
        timeout_s = _check_room(replica, answers, request, params)
        admitted = admit(params, replica.runner, replica.settings, tenant)
        if replica.safety is not None:
            await in_worker(replica, replica.safety.check_prompt, params.prompt)
        return await answers.answer(
            request, params, admitted, output_format, "image_generation", timeout_s
        )

    async def edits(request: Request) -> Response:
        """Redraw one image after a prompt (image-to-image); `strength` says how far."""
        params, upload = await parse_edit(request, replica.settings)
        check_model(params.model, replica.runner.info.model_id, replica.settings)
        output_format = accepted_format(request.headers.get("accept", ""), params)
        max_px = replica.settings.max_input_px
        tenant = request.state.exchange.tenant
        timeout_s = _check_room(replica, answers, request, params)

        def prepare() -> Admitted:
            pixels = decode_image(upload.data, max_px=max_px, field=upload.field)
            admitted = admit(params, replica.runner, replica.settings, tenant, pixels)
            if replica.safety is not None:
                replica.safety.check_prompt(params.prompt)
            return admitted

        admitted = await in_worker(replica, prepare)
        return await answers.answer(
            request, params, admitted, output_format, "image_edit", timeout_s
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

    @router.get(f"{IMAGE_FILES.removeprefix(router.prefix)}{{name}}", response_class=Response)
    def image_file(name: str) -> Response:  # not async: it reads a file
        """An image that an answer of `response_format` `url` named; its name needs no key."""
        found = files and files.read(name)
        if not found:
            raise NotFound(
                f"image file {name[:80]!r} is expired or unknown"
                + (f"; they are kept for {files.life_s:g} s" if files else ": none are kept here")
            )
        headers = {"cache-control": f"private, max-age={int(found.left_s)}, immutable"}
        return Response(found.data, media_type=found.media_type, headers=headers)

    return router


def _check_room(replica: Replica, answers: Answers, request: Request, params: ImageParams) -> float:
    """The seconds that a request has. Raises `Overloaded` before one that will be refused has cost
    more than its parsing.

    Of one that may need no drawing it is seen later: what is not cached is refused then.
    """
    check_limits(params, replica.settings)
    tenant = request.state.exchange.tenant
    timeout_s = given_timeout_s(request, replica.settings.request_timeout_s)
    if not answers.may_be_cached(params):
        replica.loop.check(params.n, tenant.name, priority_of(params, tenant), timeout_s)
    return timeout_s


def _model_object(replica: Replica) -> ModelObject:
    info, settings = replica.runner.info, replica.settings
    details = {
        "engine": info.backend,
        "engine_reason": info.backend_reason,
        "precision": info.precision,
        "aliases": list(settings.aliases),
        "default_size": f"{info.default_width}x{info.default_height}",
        "size_multiple_px": info.size_multiple,
        "min_size_px": info.min_size_px,
        "max_size_px": info.max_size_px,
        "default_num_inference_steps": info.default_num_steps,
        "default_timesteps": info.default_timesteps,
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
