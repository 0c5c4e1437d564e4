"""The ASGI application of one replica: routes, probes, error shapes. Runs with or without Ray."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from service.api import build_router
from service.errors import (
    BadRequest,
    EngineFailure,
    MethodNotAllowed,
    NotFound,
    NotReady,
    ServiceError,
)
from service.keys import Authentication, KeyRing
from service.replica import Replica
from service.telemetry import Telemetry

logger = logging.getLogger("fourstep.app")
STUDIO_PAGE = Path(__file__).parent / "static" / "index.html"


def build_app(replica: Replica, *, behind_ray: bool = False) -> FastAPI:
    """The whole HTTP surface over ``replica``; its lifespan starts (if need be) and closes it.

    ``behind_ray`` leaves the ``X-Request-ID`` answer header to Ray Serve, which sends it already.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not replica.started:
            await asyncio.to_thread(replica.start)
        yield
        await asyncio.to_thread(replica.close)

    app = FastAPIOffline(
        title="Fourstep",
        version=importlib.metadata.version("fourstep"),
        description="Few-step diffusion over an OpenAI-compatible Images API.",
        lifespan=lifespan,
    )
    app.include_router(build_router(replica))
    _add_probes(app, replica)
    _add_error_shapes(app)
    if replica.settings.api_keys_file:
        app.add_middleware(Authentication, keys=KeyRing(replica.settings.api_keys_file))
    app.add_middleware(Telemetry, replica=replica, send_request_id=not behind_ray)
    return app


def _add_probes(app: FastAPI, replica: Replica) -> None:
    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        """Liveness: this process answers."""
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    async def readyz() -> PlainTextResponse:
        """Readiness: the engine is warmed up and its thread serves."""
        if not replica.ready:
            raise NotReady("the engine is not serving", retry_after_s=1)
        return PlainTextResponse("ready\n")

    @app.get("/metrics")
    def metrics() -> Response:  # not async: reading the shared files belongs in a thread
        """Prometheus text format."""
        body, media_type = replica.metrics.exposition()
        return Response(body, media_type=media_type)

    @app.get("/", include_in_schema=False)
    async def studio() -> FileResponse:
        return FileResponse(STUDIO_PAGE, media_type="text/html")


def _add_error_shapes(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape, whoever raised it."""

    @app.exception_handler(ServiceError)
    async def service_error(_: Request, error: ServiceError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers())

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

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        logger.exception("unforeseen error in %s %s", request.method, request.url.path)
        failure = EngineFailure("an error in this service; its log has the details")
        return JSONResponse(failure.body(), failure.status)
