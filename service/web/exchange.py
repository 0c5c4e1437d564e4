"""What wraps every HTTP exchange: request id, trace, body limit, access log, request metrics.

Pure ASGI, because it must see streamed bodies, disconnects and cancellations as they are.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access.keys import IMAGE_FILES
from service.access.quota import Tenant
from service.errors import BodyTimeout, ServiceError, TooLarge
from service.replica import Replica
from service.settings import Settings
from service.web.headers import MAX_REQUEST_ID_CHARS
from service.web.intake import Intake

if TYPE_CHECKING:
    from service.telemetry.tracing import RequestTrace

logger = logging.getLogger("fourstep.access")
request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
trace_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("trace_id", default="")

VALID_REQUEST_ID = re.compile(rf"[\x21-\x7e]{{1,{MAX_REQUEST_ID_CHARS}}}")
COUNTED = {
    ("POST", "/v1/images/generations"): "generations",
    ("POST", "/v1/images/edits"): "edits",
    ("POST", "/v1/videos"): "videos",
}
QUIET = {"/healthz", "/readyz", "/metrics", "/-/healthz", "/-/routes"}


class Telemetry:
    """Middleware: gives each request an id, bounds its body, logs and counts how it ended."""

    def __init__(
        self, app: ASGIApp, replica: Replica, intake: Intake, *, send_request_id: bool
    ) -> None:
        self._app = app
        self._replica = replica
        self._intake = intake
        self._send_request_id = send_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._replica.settings, self._intake)
        exchange.send_request_id = self._send_request_id
        request_id_var.set(exchange.request_id)
        if self._replica.tracing is not None and (exchange.method, exchange.path) in COUNTED:
            exchange.trace = self._replica.tracing.begin(
                exchange.method, exchange.path, exchange.request_id, scope["headers"]
            )
            trace_id_var.set(exchange.trace.trace_id)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            exchange.status = 499
            raise
        except ClientDisconnect:  # in the middle of its body: there is nobody to answer
            exchange.status = 499
        except ServiceError as error:  # a key or the body limit, before any handler could answer
            if exchange.started:
                raise
            await exchange.answer(error)
        finally:
            exchange.release_body()
            self._record(exchange)

    def _record(self, exchange: Exchange) -> None:
        seconds = time.perf_counter() - exchange.begun
        path = exchange.path
        if exchange.trace is not None:
            exchange.trace.end(exchange.status)
        if (endpoint := COUNTED.get((exchange.method, path))) and self._replica.started:
            self._replica.metrics.request(endpoint, exchange.status, seconds)
        if path not in QUIET:
            shown = f"{IMAGE_FILES}..." if path.startswith(IMAGE_FILES) else path  # a secret
            fields = {"method": exchange.method, "path": shown, "status": exchange.status}
            fields |= {"duration_ms": round(seconds * 1e3, 2)} | exchange.log_fields
            logger.info("request", extra={"fields": fields})


class Exchange:
    """One HTTP exchange as it passes: `receive` and `send` with eyes and limits."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, settings: Settings, intake: Intake
    ) -> None:
        headers = {key.lower(): value for key, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = given if VALID_REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        self.method: str = scope["method"]
        self.path: str = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        self.status = 500  # until a response starts
        self.started = False
        self.begun = time.perf_counter()
        self.log_fields: dict[str, Any] = {}
        self.tenant = Tenant()  # until a key says whose request it is
        self.send_request_id = True
        self.trace: RequestTrace | None = None
        scope.setdefault("state", {})["exchange"] = self
        self._receive, self._send = receive, send
        self._settings, self._intake = settings, intake
        self._num_body_bytes = self._num_held_bytes = 0
        self._is_complete = False
        declared = headers.get(b"content-length", b"0")
        self._declared = int(declared) if declared.isdigit() else 0

    async def receive(self) -> Message:
        if self._is_complete:  # what is left to hear of is that the client has gone
            return await self._receive()
        message = await self._in_time()
        if message["type"] == "http.request":
            self._is_complete = not message.get("more_body", False)
            self._count(len(message.get("body", b"")))
        return message

    async def _in_time(self) -> Message:
        left_s = self.begun + self._settings.body_timeout_s - time.perf_counter()
        try:
            async with asyncio.timeout(left_s):
                return await self._receive()
        except TimeoutError:
            raise BodyTimeout(
                f"{self._num_body_bytes} bytes of the body came within "
                f"{self._settings.body_timeout_s:g} s, and more should follow; send a smaller one",
                retry_after_s=1,
            ) from None

    def _count(self, num_bytes: int) -> None:
        self._num_body_bytes += num_bytes
        size, limit = max(self._num_body_bytes, self._declared), self._settings.max_body_bytes
        if size > limit:
            raise TooLarge(
                f"the body has {size} bytes or more; at most {limit} are accepted, send smaller "
                "images"
            )
        self._intake.hold(num_bytes)
        self._num_held_bytes += num_bytes

    def release_body(self) -> None:
        """Nothing of the body is kept any more. May be called again."""
        self._intake.release(self._num_held_bytes)
        self._num_held_bytes = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            if self.send_request_id:
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", self.request_id.encode("latin-1")),
                ]
        await self._send(message)

    async def answer(self, error: ServiceError) -> None:
        body = json.dumps(error.body()).encode()
        headers = [(b"content-type", b"application/json")]
        headers += [(k.encode(), v.encode()) for k, v in error.headers().items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
