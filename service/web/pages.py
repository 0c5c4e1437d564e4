"""The two pages for people: the studio and the API reference, with what each may load and run.

Neither asks another host for anything, and their policies hold browsers to that.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

STUDIO = Path(__file__).parent / "static"
REVALIDATE = {"cache-control": "no-cache"}  # modules of two releases would not fit together
STATIC = "/static-offline-docs"  # where fastapi_offline mounts Swagger UI


def add_pages(app: FastAPI) -> None:
    """Add ``/`` and ``/docs``; neither is part of the API that ``/openapi.json`` describes."""
    page = (STUDIO / "index.html").read_text()
    headers = REVALIDATE | {"content-security-policy": content_security_policy(page)}
    app.mount("/studio", StudioFiles(directory=STUDIO), "studio")

    @app.get("/", include_in_schema=False)
    async def studio() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "")  # the route prefix, where Ray Serve has one
        page = get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=f"{app.title} API",
            swagger_js_url=f"{root}{STATIC}/swagger-ui-bundle.js",
            swagger_css_url=f"{root}{STATIC}/swagger-ui.css",
            swagger_favicon_url=f"{root}{STATIC}/favicon.png",
        )
        html = bytes(page.body).decode()
        return HTMLResponse(
            html, headers={"content-security-policy": content_security_policy(html)}
        )


class StudioFiles(StaticFiles):
    """Scripts and styles of the studio, which a browser keeps and asks about before each use."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(REVALIDATE)
        return response


def content_security_policy(html: str) -> str:
    """Let a page run its own inline scripts and styles, known by their hashes, and no others.

    It may load files of its own host, show images and clips of its own (``data:``, ``blob:``) and
    call its own API.
    """
    sources = {}
    for tag in ("script", "style"):
        inline = filter(None, re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL))
        sources[tag] = " ".join(["'self'", *map(_hash, inline)])
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "img-src 'self' data: blob:; media-src blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
