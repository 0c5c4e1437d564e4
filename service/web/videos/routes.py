"""`/v1/videos`: jobs in OpenAI's shape, and the clip itself for whoever asks for it by `Accept`."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from service.batching.request import Kind
from service.errors import BadRequest, NotFound
from service.replica import Replica
from service.web.admission import Admitted, admit, check_limits, check_model, priority_of
from service.web.answers import (
    given_timeout_s,
    in_worker,
    raw_headers,
    server_timing,
    until_disconnect,
)
from service.web.api import PlainRoute
from service.web.videos.bodies import accepted_clip, parse_video
from service.web.videos.clip_job import ClipJob
from service.web.videos.clips import CLIP_MEDIA_TYPES
from service.web.videos.jobs import VideoJobs
from service.web.videos.length import Length, length_of
from service.web.videos.schema import Video, VideoDeleted, VideoList, VideoParams
from service.web.videos.store import VideoStore

Object = dict[str, Any]
PATH = "/v1/videos"
MAX_PAGE = 100
POLL_MS = "1000"  # what OpenAI's client waits between two looks
NO_STORE = {"cache-control": "no-store"}  # a deleted clip is to be gone from browsers too
METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
UNSUPPORTED = {  # what OpenAI has and no model here does
    "/edits": "edits of clips",
    "/extensions": "extensions of clips",
    "/characters": "characters",
    "/{video_id}/remix": "remixes",
}


def build_video_router(replica: Replica, store: VideoStore, jobs: VideoJobs) -> APIRouter:
    """Routes of one replica; ``store`` has the jobs of all, ``jobs`` its own."""
    router = APIRouter(prefix=PATH)

    async def create(request: Request) -> Response:
        """Draw a clip, as a job to be asked for; `Accept: video/mp4`, `image/webp` or `image/gif`
        waits and answers the clip itself.
        """
        _check_draws_clips(replica)
        params = await parse_video(request, replica.settings)
        check_model(params.model, replica.runner.info.model_id, replica.settings)
        params, at_once = accepted_clip(request.headers.get("accept", ""), params)
        check_limits(params, replica.settings)
        _check_clip_limits(params)
        length = length_of(params, replica.runner.info)
        tenant = request.state.exchange.tenant
        longest_s = replica.settings.request_timeout_s
        if not at_once:
            longest_s = replica.settings.video_timeout_s
        timeout_s = given_timeout_s(request, longest_s)
        replica.quotas.check(tenant, length.num_frames, "num_frames")
        kind = Kind(tenant.name, priority_of(params, tenant), is_clip=length.num_frames > 1)
        replica.loop.check(length.num_frames, kind, timeout_s)
        deadline = replica.loop.clock() + timeout_s
        admitted = admit(
            params, replica.runner, replica.settings, tenant, num_frames=length.num_frames
        )
        if replica.safety is not None:
            await in_worker(replica, replica.safety.check_prompt, params.prompt)
        job = ClipJob(
            replica,
            params,
            admitted,
            length,
            request_id=request.state.exchange.request_id,
            tenant=tenant,
            deadline=deadline,
            with_thumbnail=not at_once,
        )
        job.request.timings.parse_s = time.perf_counter() - request.state.exchange.begun
        if at_once:
            return await _clip(request, replica, job, params, admitted)
        video = _described(params, admitted, length, replica.runner.info.model_id)
        left_s = deadline - replica.loop.clock()
        video_id = await jobs.accept(job, video, tenant.name, time.time() + left_s)
        request.state.exchange.log_fields["video"] = video_id
        return _json(video | {"id": video_id})

    router.add_api_route(
        "", create, methods=["POST"], response_model=Video, route_class_override=PlainRoute
    )

    @router.get("", response_model=VideoList)
    async def videos(
        request: Request,
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """The caller's own jobs, the newest first; those of other API keys are not among them."""
        found = await asyncio.to_thread(store.all_of, request.state.exchange.tenant.name)
        if order == "desc":
            found.reverse()
        if after is not None:
            ids = [video["id"] for video in found]
            if after not in ids:
                raise BadRequest(
                    f"after is {after!r}, which is none of your videos; it may be expired, list "
                    "from the beginning",
                    param="after",
                )
            found = found[ids.index(after) + 1 :]
        page = [video | jobs.state_of(video["id"]) for video in found[:limit]]
        return _json(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(found) > limit,
            }
        )

    @router.get("/{video_id}", response_model=Video)
    async def video(request: Request, video_id: str) -> Response:
        """A job as it is now, whichever replica draws it."""
        found = await asyncio.to_thread(store.read, video_id, request.state.exchange.tenant.name)
        if found is None:
            raise _unknown(video_id)
        open_state = jobs.state_of(video_id) if found["status"] != "completed" else {}
        return _json(found | open_state, {"openai-poll-after-ms": POLL_MS})

    @router.get("/{video_id}/content", response_class=FileResponse)
    async def content(
        request: Request,
        video_id: str,
        variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    ) -> Response:
        """The clip of a completed job, or (`thumbnail`) the frame in its middle as WebP."""
        if variant == "spritesheet":
            raise BadRequest(
                "variant is 'spritesheet'; there are 'video' and 'thumbnail'",
                param="variant",
                code="unsupported_value",
            )
        key = request.state.exchange.tenant.name
        found = await asyncio.to_thread(store.read, video_id, key)
        if found is None:
            raise _unknown(video_id)
        if found["status"] != "completed":
            raise _no_content(found)
        kept = await asyncio.to_thread(
            store.content, video_id, key, thumbnail=variant == "thumbnail"
        )
        if kept is None:
            raise _unknown(video_id)
        return FileResponse(kept.path, media_type=kept.media_type, headers=NO_STORE)

    @router.delete("/{video_id}")
    async def delete(request: Request, video_id: str) -> VideoDeleted:
        """Remove a job and its clip; one that is drawn leaves at its next step."""
        key = request.state.exchange.tenant.name
        if not await asyncio.to_thread(store.remove, video_id, key):
            raise _unknown(video_id)
        jobs.cancel(video_id)
        return VideoDeleted(id=video_id)

    for path, what in UNSUPPORTED.items():
        router.add_api_route(path, _refusal_of(what), methods=["POST"], include_in_schema=False)
    for path, allowed in (("", ("GET", "POST")), ("/{video_id}", ("DELETE", "GET"))):
        others = sorted(METHODS - {*allowed})
        router.add_api_route(path, _only(allowed), methods=others, include_in_schema=False)
    return router


async def _clip(
    request: Request, replica: Replica, job: ClipJob, params: VideoParams, admitted: Admitted
) -> Response:
    """The clip itself; a client that goes away cancels it."""
    exchange = request.state.exchange
    if exchange.trace is not None:
        exchange.trace.follow(job.request, replica.loop.clock, replica.runner.info.model_id)
    async with job:
        data = await until_disconnect(request, job.clip())
    timings = job.request.timings
    fields = {"frames": admitted.num_frames, "steps": admitted.num_steps}
    exchange.log_fields |= fields | timings.milliseconds()
    headers = {"server-timing": server_timing(timings)} | raw_headers(admitted)
    return Response(data, media_type=CLIP_MEDIA_TYPES[params.output_format], headers=headers)


def _check_draws_clips(replica: Replica) -> None:
    """Raises `BadRequest` where the model draws pictures alone."""
    info = replica.runner.info
    if not info.draws_clips:
        raise BadRequest(
            f"{info.model_id!r} draws images, and no clips: POST /v1/images/generations",
            param="model",
            code="unsupported_model",
        )


def _check_clip_limits(params: VideoParams) -> None:
    if params.output_compression is not None and params.output_format == "gif":
        raise BadRequest(
            f"output_compression is {params.output_compression} but output_format is 'gif', which "
            "has none; use mp4 or webp, or leave it out",
            param="output_compression",
        )


def _described(params: VideoParams, admitted: Admitted, length: Length, model_id: str) -> Object:
    """The job as it is told of, but for its id."""
    return Video(
        id="",
        status="queued",
        progress=0,
        created_at=int(time.time()),
        completed_at=None,
        expires_at=None,
        error=None,
        model=model_id,
        prompt=params.prompt,
        seconds=length.text,
        size=admitted.size,
        num_frames=length.num_frames,
        fps=length.fps,
        output_format=params.output_format,
        seed=admitted.seed,
        num_inference_steps=admitted.num_steps,
        timesteps=None if admitted.timesteps is None else list(admitted.timesteps),
        guidance_scale=admitted.guidance_scale,
        sampler=admitted.sampler,
        decoder=admitted.decoder,
        loras=dict(admitted.loras),
        timings=None,
        warnings=admitted.warnings,
    ).model_dump()


def _json(content: Object, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), media_type="application/json", headers=headers)


def _unknown(video_id: str) -> NotFound:
    return NotFound(
        f"video {video_id[:80]!r} is unknown, expired or deleted (GET /v1/videos lists yours)",
        param="video_id",
    )


def _no_content(video: Object) -> BadRequest:
    if video["status"] == "failed":
        what, code = f"has failed: {video['error']['message']}", "video_failed"
    else:
        what = f"is {video['status']}; ask GET /v1/videos/{video['id']} until it is completed"
        code = "video_not_ready"
    return BadRequest(f"{video['id']} {what}", param="video_id", code=code)


def _refusal_of(what: str) -> Any:
    async def refuse() -> None:
        raise BadRequest(
            f"there are no {what} here: clips are drawn from text alone, by POST /v1/videos",
            code="unsupported_endpoint",
        )

    return refuse


def _only(allowed: tuple[str, ...]) -> Any:
    """Where a path has several routes Starlette would name the methods of the first alone."""

    async def refuse() -> None:
        raise HTTPException(405, headers={"Allow": ", ".join(allowed)})

    return refuse
