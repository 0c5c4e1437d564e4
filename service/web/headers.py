"""What browsers are told with every answer: security headers, and which other sites may ask.

Pure ASGI, a few microseconds an answer. The pages for people bring a policy of their own
(`service.web.pages`); what an answer says itself is never overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# An answer of the API is data: a browser that is led to one must run, frame and sniff nothing.
ALWAYS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}
NO_STORE = (b"cache-control", b"no-store")
CACHED = {b"cache-control", b"etag"}  # either says that an answer may be kept, and how

MAX_REQUEST_ID_CHARS = 128  # of a client's own, which is logged and sent back

# What scripts of other origins may read besides the few headers that browsers always show.
EXPOSED = (
    "x-request-id",
    "server-timing",
    "retry-after",
    "x-should-retry",
    "x-fourstep-seed",
    "x-fourstep-warnings",
    "x-fourstep-cached",
)


class SecurityHeaders:
    """Middleware, outermost: adds what `ALWAYS` holds, and forbids caches to keep an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"] = list(message.get("headers", ()))
                given = {name.lower() for name, _ in headers}
                headers += [item for item in ALWAYS.items() if item[0] not in given]
                if message["status"] >= 400 or not given & CACHED:
                    headers[:] = [item for item in headers if item[0].lower() != NO_STORE[0]]
                    headers.append(NO_STORE)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def cors_options(origins: Sequence[str]) -> dict[str, Any]:
    """Options of Starlette's `CORSMiddleware` that let pages of ``origins`` use the whole API.

    Keys travel in a header that the page sets itself, so browsers need send no credentials of
    their own; any request header is taken, as the `openai` client in a page sends a dozen.
    """
    return {
        "allow_origins": tuple(origins),
        "allow_methods": ("GET", "POST", "DELETE"),
        "allow_headers": ("*",),
        "expose_headers": EXPOSED,
    }
