"""Server-sent events in OpenAI's shapes: previews and images as they come, an error, `[DONE]`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.errors import Cancelled, ServiceError
from service.web.admission import Admitted
from service.web.exchange import Exchange
from service.web.images import to_base64
from service.web.job import EncodedImage, Job, flags, withheld_warnings
from service.web.schema import ImageParams

NO_BUFFERING = {"cache-control": "no-store", "x-accel-buffering": "no"}


class EventStream(StreamingResponse):
    """The answer to an accepted job; it leaves the job however it ends, even before it began.

    The head says 200; how the stream ended is told to the metrics by ``exchange.status``.
    """

    def __init__(
        self,
        job: Job,
        params: ImageParams,
        admitted: Admitted,
        event_name: str,
        exchange: Exchange,
    ) -> None:
        self._job, self._params, self._admitted = job, params, admitted
        self._event_name, self._exchange = event_name, exchange
        self._outcome = Cancelled.status  # unless it gets to an end
        super().__init__(self._events(), media_type="text/event-stream", headers=NO_BUFFERING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            fields = {"n": self._params.n, "steps": self._admitted.num_steps}
            self._exchange.log_fields |= fields | self._job.request.timings.milliseconds()
            self._exchange.status = self._outcome
            await self._job.__aexit__(None, None, None)

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for image in self._job.items():
                event = self._event(image)
                yield _sse(event["type"], event)
            self._outcome = 200
        except ServiceError as error:
            self._outcome = error.status
            yield _sse("error", error.body())
        yield b"data: [DONE]\n\n"

    def _event(self, image: EncodedImage) -> dict[str, Any]:
        params, admitted = self._params, self._admitted
        kind = "completed" if image.preview_index is None else "partial_image"
        event: dict[str, Any] = {
            "type": f"{self._event_name}.{kind}",
            "b64_json": to_base64(image.data),
            "created_at": int(time.time()),
            "image_index": image.row_index,
            "seed": admitted.seed + image.row_index,
            "size": admitted.size,
            "quality": params.quality,
            "background": "opaque",
            "output_format": params.output_format,
        }
        if image.preview_index is not None:
            return event | {"partial_image_index": image.preview_index}
        event["timings"] = self._job.request.timings.milliseconds()
        event["warnings"] = admitted.warnings + withheld_warnings([image])
        return event | flags(image)


def _sse(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"
