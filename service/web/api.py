"""The OpenAI-compatible endpoints: generations, edits, models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from service.access.keys import IMAGE_FILES
from service.batching.request import Kind
from service.errors import NotFound
from service.replica import Replica
from service.web.admission import Admitted, admit, check_limits, check_model, priority_of
from service.web.answers import Answers, given_timeout_s, until_disconnect
from service.web.image_files import ImageFiles
from service.web.intake import Intake
from service.web.masks import Edited
from service.web.parsing import Uploads, parse_edit, parse_generation, with_accepted_format
from service.web.schema import ImageParams, ImagesResponse, ModelList, ModelObject
from service.web.uploads import decode_picture


class PlainRoute(APIRoute):
    """A handler that takes the request and makes the response itself; FastAPI just documents it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def build_router(
    replica: Replica, answers: Answers, intake: Intake, files: ImageFiles | None
) -> APIRouter:
    """Routes of one replica, whose uploads come in by ``intake``; ``files`` are those that
    ``answers`` names by URL, if any.
    """
    router = APIRouter(prefix="/v1")

    async def generations(request: Request) -> Response:
        """Draw images from a prompt. `Accept: image/png|jpeg|webp` returns the raw image."""
        params = await parse_generation(request, replica.settings)
        check_model(params.model, replica.runner.info.model_id, replica.settings)
        params, raw = with_accepted_format(request.headers.get("accept", ""), params)
        tenant = request.state.exchange.tenant
        deadline = _check_room(replica, answers, request, params)
        admitted = admit(params, replica.runner, replica.settings, tenant)
        return await answers.answer(request, params, admitted, raw, "image_generation", deadline)

    async def edits(request: Request) -> Response:
        """Redraw an image, or what a mask marks of it, after a prompt; `strength` says how far."""
        params, uploads = await parse_edit(request, replica.settings)
        check_model(params.model, replica.runner.info.model_id, replica.settings)
        params, raw = with_accepted_format(request.headers.get("accept", ""), params)
        max_px = replica.settings.max_input_px
        tenant = request.state.exchange.tenant
        deadline = _check_room(replica, answers, request, params)

        def prepare(uploads: Uploads) -> Admitted:
            pictures = [
                decode_picture(each.data, max_px=max_px, field=each.field)
                for each in uploads
                if each is not None
            ]
            edited = Edited.of(*pictures)
            return admit(params, replica.runner, replica.settings, tenant, edited)

        left_s = deadline - replica.loop.clock()
        decoding = intake.decode(functools.partial(prepare, uploads), left_s)
        admitted = await until_disconnect(request, decoding)
        del uploads  # megabytes, for as long as the images take
        request.state.exchange.release_body()
        return await answers.answer(request, params, admitted, raw, "image_edit", deadline)

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

    file_path = f"{IMAGE_FILES.removeprefix(router.prefix)}{{name}}"

    @router.head(file_path, include_in_schema=False)  # what chat programs ask before a preview
    @router.get(file_path, response_class=Response)
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
    """The request's deadline on the engine loop's clock. Raises `Overloaded` or `RateLimited`
    before one that will be refused has cost more than its parsing.

    Of one that may need no drawing it is seen later: what is not cached is refused then.
    """
    check_limits(params, replica.settings)
    tenant = request.state.exchange.tenant
    timeout_s = given_timeout_s(request, replica.settings.request_timeout_s)
    replica.quotas.check(tenant, params.n)
    if not answers.may_be_cached(params):
        kind = Kind(tenant.name, priority_of(params, tenant))
        replica.loop.check(params.n, kind, timeout_s)
    return replica.loop.clock() + timeout_s


def _model_object(replica: Replica) -> ModelObject:
    info, settings = replica.runner.info, replica.settings
    details = {
        "engine": info.backend,
        "engine_reason": info.backend_reason,
        "precision": info.precision,
        "components": dict(info.components),
        "embeddings": dict(info.embeddings),
        "aliases": list(settings.aliases),
        "default_size": f"{info.default_width}x{info.default_height}",
        "size_multiple_px": info.size_multiple,
        "default_num_frames": info.default_num_frames,
        "max_num_frames": info.max_num_frames,
        "frames_per_second": info.frames_per_second,
        "min_size_px": info.min_size_px,
        "max_size_px": info.max_size_px,
        "default_num_inference_steps": info.default_num_steps,
        "default_timesteps": info.default_timesteps,
        "max_num_inference_steps": settings.max_steps,
        "default_guidance_scale": info.default_guidance_scale,
        "guidance_embedding": info.guidance_embedding,
        "size_conditioning": info.size_conditioning,
        "scheduler": info.scheduler,
        "default_sampler": info.default_sampler,
        "default_sampler_stands_in": info.stands_in,
        "samplers": list(info.samplers),
        "default_decoder": info.default_decoder,
        "decoders": list(info.decoders),
        "loras": list(info.loras),
        "default_loras": settings.default_loras,
        "max_prompt_tokens": info.max_chunks * info.max_tokens,
        "max_images": settings.max_images,
    }
    return ModelObject(id=info.model_id, created=replica.created, details=details)
