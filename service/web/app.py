"""The ASGI application of one replica: routes, probes, error shapes. Runs with or without Ray."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access.keys import Authentication, KeyRing
from service.errors import (
    BadRequest,
    EngineFailure,
    MethodNotAllowed,
    NotFound,
    NotReady,
    ServiceError,
)
from service.replica import Replica
from service.telemetry.versions import version_of
from service.web.answers import Answers
from service.web.api import build_router
from service.web.exchange import Telemetry
from service.web.headers import SecurityHeaders, cors_options
from service.web.image_cache import ImageCache
from service.web.image_files import ImageFiles
from service.web.intake import Intake
from service.web.live.routes import add_live_routes
from service.web.openapi import complete_document
from service.web.pages import add_pages
from service.web.parsing import plain, shown
from service.web.videos.document import describe_videos
from service.web.videos.jobs import VideoJobs
from service.web.videos.routes import build_video_router
from service.web.videos.store import VideoStore

logger = logging.getLogger("fourstep.app")


def build_app(replica: Replica, *, behind_ray: bool = False) -> FastAPI:
    """The whole HTTP surface over ``replica``; its lifespan starts (if need be) and closes it.

    ``behind_ray`` leaves the ``X-Request-ID`` answer header to Ray Serve, which sends it already.
    """

    settings = replica.settings
    files = _image_files(replica) if settings.image_files_s else None
    cache = _image_cache(replica) if settings.image_cache_bytes else None
    videos = _video_store(replica)
    jobs = VideoJobs(replica, videos)
    intake = Intake(settings.num_upload_workers, settings.max_held_bytes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not replica.started:
            await asyncio.to_thread(replica.start)
        if files is not None:
            files.start()
        if replica.runner.info.draws_clips:
            jobs.start()
        yield
        intake.close()
        await jobs.close()
        if files is not None:
            await asyncio.to_thread(files.close)
        await asyncio.to_thread(replica.close)

    app = FastAPIOffline(
        title="Fourstep",
        version=version_of("fourstep"),
        description="Few-step diffusion over an OpenAI-compatible Images API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    keys = KeyRing(settings.api_keys_file) if settings.api_keys_file else None
    app.include_router(build_router(replica, Answers(replica, files, cache), intake, files))
    app.include_router(build_video_router(replica, videos, jobs))
    add_live_routes(app, replica, intake, keys)
    _add_probes(app, replica)
    add_pages(app)
    _add_error_shapes(app)
    complete_document(app, settings, functools.partial(describe_videos, replica=replica))
    # Each of these goes around those before it.
    if keys is not None:
        app.add_middleware(Authentication, keys=keys)
    app.add_middleware(UnforeseenErrors)
    app.add_middleware(Telemetry, replica=replica, intake=intake, send_request_id=not behind_ray)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, **cors_options(settings.cors_origins))
    app.add_middleware(SecurityHeaders)
    return app


def _image_files(replica: Replica) -> ImageFiles:
    settings = replica.settings
    return ImageFiles(
        settings.image_files_dir or settings.cache_dir / "images",
        life_s=settings.image_files_s,
        max_bytes=settings.image_files_bytes,
        observe=lambda num_files, num_bytes: replica.metrics.image_files(num_files, num_bytes),
    )


def _video_store(replica: Replica) -> VideoStore:
    settings = replica.settings
    return VideoStore(
        settings.video_files_dir or settings.cache_dir / "videos",
        life_s=settings.video_files_s,
        max_bytes=settings.video_files_bytes,
    )


def _image_cache(replica: Replica) -> ImageCache:
    return ImageCache(
        replica.settings.image_cache_bytes,
        observe_lookup=lambda hit: replica.metrics.cache_lookup(hit),
        observe_bytes=lambda num_bytes: replica.metrics.cache_bytes(num_bytes),
    )


class UnforeseenErrors:
    """Middleware: an error that nobody expected leaves in the shape of all others.

    Starlette's own place for that is around all middleware: such an answer would lack its request
    id and the security headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except (ServiceError, ClientDisconnect):
            raise  # foreseen: Telemetry answers the one and counts the other
        except Exception:
            if started or scope["type"] != "http":
                raise
            logger.exception("unforeseen error in %s %s", scope["method"], scope["path"])
            failure = EngineFailure("an error in this service; its log has the details")
            await JSONResponse(failure.body(), failure.status)(scope, receive, send)


def _add_probes(app: FastAPI, replica: Replica) -> None:
    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> PlainTextResponse:
        """Liveness: this process answers."""
        return PlainTextResponse("ok\n")

    @app.get("/readyz", response_class=PlainTextResponse)
    async def readyz() -> PlainTextResponse:
        """Readiness: the engine is warmed up and its thread serves."""
        if not replica.ready:
            raise NotReady("the engine is not serving", retry_after_s=1)
        return PlainTextResponse("ready\n")

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:  # not async: reading the shared files belongs in a thread
        """Prometheus text format."""
        body, media_type = replica.metrics.exposition()
        return Response(body, media_type=media_type)


def _add_error_shapes(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape, whoever raised it."""

    @app.exception_handler(ServiceError)
    async def service_error(_: Request, error: ServiceError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers())

    @app.exception_handler(RequestValidationError)
    async def wrong_query(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][1:]))
        known = BadRequest(f"{name} is {shown(first['input'])}: {plain(first['msg'])}", param=name)
        return JSONResponse(known.body(), known.status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path}"
        known: ServiceError = BadRequest(str(error.detail))
        if error.status_code == 404:
            known = NotFound(f"no such path: {where} (GET /docs lists them)")
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            known = MethodNotAllowed(f"{where} is not allowed; use {allowed}")
        return JSONResponse(known.body(), known.status, headers=error.headers)
