"""Every way a request can fail, and what the client is told: one tree, one table.

    HTTP head ──▶ Unauthorized                           before the body is read
    HTTP body ──▶ BadRequest, NotFound, TooLarge        before anything is queued
    admission ──▶ RateLimited, Overloaded, NotReady     nothing was accepted
    queue     ──▶ DeadlineExceeded, Cancelled           accepted, left at a step boundary
    engine    ──▶ EngineFailure                         accepted, its batch or its row failed

Each class is one row of the table: HTTP status, OpenAI error ``type`` and default ``code``.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ServiceError(Exception):
    """A failure with its HTTP meaning.

    ``param`` names the request field at fault, as OpenAI's error object does; ``code`` refines the
    class's default. ``retry_after_s`` becomes ``Retry-After``; ``retry`` False tells the ``openai``
    client (``x-should-retry``) that trying again cannot help.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    retry: ClassVar[bool | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The OpenAI error object: ``{"error": {message, type, param, code}}``."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """``Retry-After`` (whole seconds, at least 1) and ``x-should-retry`` where they apply."""
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s + 0.5)))
        if self.retry is not None:
            headers["x-should-retry"] = str(self.retry).lower()
        return headers


class BadRequest(ServiceError):
    """A field has a wrong type, value or combination."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class Unauthorized(ServiceError):
    """No API key, or none that is known."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"www-authenticate": "Bearer"}


class NotFound(ServiceError):
    """No such path or model."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowed(ServiceError):
    """The path exists for another method."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class BodyTimeout(ServiceError):
    """The body did not come in time."""

    status = 408
    type = "timeout_error"
    default_code = "timeout"


class TooLarge(ServiceError):
    """The body or an image in it exceeds a limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "too_large"


class RateLimited(ServiceError):
    """This API key has had its share; nothing was accepted."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class Overloaded(ServiceError):
    """There is too much work before it; nothing was accepted."""

    status = 429
    type = "rate_limit_error"
    default_code = "overloaded"


class Cancelled(ServiceError):
    """The client went away; nobody reads this answer, the metrics do (nginx's 499)."""

    status = 499
    type = "request_cancelled"
    default_code = "cancelled"


class EngineFailure(ServiceError):
    """The engine raised while working on this request's rows."""

    status = 500
    default_code = "engine_failure"


OUT_OF_MEMORY = "out_of_memory"  # code of a `NotReady` that says nothing of other requests


class NotReady(ServiceError):
    """The replica is starting, draining or its engine is gone, or has no memory for this."""

    status = 503
    default_code = "not_ready"


class DeadlineExceeded(ServiceError):
    """The request's deadline passed before its image was finished."""

    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"
    retry = False  # the client's own time is up: another attempt starts from nothing
