"""One live session: frames come in, pictures go out, and nothing is kept for who is too slow.

    read ──▶ the pending frame, of which the newest wins ──▶ draw, one at a time ──▶ send

A picture is drawn when the one before it has been handed over, so a client that does not read gets
no more of them made, and is let go after a while. A frame that is drawn when a newer one comes
leaves at its next step, unless half of it is done or its predecessor has left so: somebody who
sends faster than is drawn still sees something.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from engines.families.recipe import Blend
from service.access.quota import Tenant
from service.errors import (
    OUT_OF_MEMORY,
    BadRequest,
    Cancelled,
    NotReady,
    Overloaded,
    RateLimited,
    ServiceError,
    TooLarge,
)
from service.replica import Replica
from service.web.admission import MAX_RANDOM_SEED, Admitted, admit, check_limits, check_model
from service.web.answers import in_worker
from service.web.images import MEDIA_TYPES
from service.web.intake import Intake
from service.web.job import AsImages, EncodedImage, Job
from service.web.live import messages
from service.web.live.likeness import Look, Shown
from service.web.live.messages import Frame, LiveOptions, SessionUpdate, Wire
from service.web.live.slide import Slide
from service.web.masks import Edited
from service.web.parsing import bad_request
from service.web.schema import EditParams, GenerationRequest, ImageParams
from service.web.uploads import decode_picture

logger = logging.getLogger("fourstep.live")
SILENT, REFUSED, UNFORESEEN, RESTARTING = 1000, 1008, 1011, 1012  # of RFC 6455's registry
FIELDS = (
    "prompt", "model", "negative_prompt", "strength", "seed", "num_inference_steps", "timesteps",
    "guidance_scale", "sampler", "decoder", "prompt_weighting", "eta", "loras", "size",
    "output_format", "output_compression", "paste_back", "mask_feather", "priority",
    *messages.SESSION_FIELDS,
)  # fmt: skip
ONLY_EDITS = ("strength", "paste_back", "mask_feather")
MAX_WAIT_S = 1.0  # after a frame that was shed
GOODBYE_S = 5.0  # for a client to hear why a session ends


class LiveSession:
    """Runs on the event loop until its client goes, or is too long silent."""

    def __init__(
        self,
        socket: WebSocket,
        replica: Replica,
        intake: Intake,
        owner: Callable[[], Tenant | None],
        wire: Wire,
    ) -> None:
        """``owner`` says whose its key is now; None: nobody's any more."""
        self.tenant = owner() or Tenant()
        self._wire, self._owner = wire, owner
        self._socket, self._replica, self._intake = socket, replica, intake
        self._id = f"live_{uuid.uuid4().hex}"
        self._num_frames = 0
        self._values: dict[str, Any] = {
            "seed": secrets.randbelow(MAX_RANDOM_SEED), "output_format": "jpeg",
        }  # fmt: skip
        self._sending = asyncio.Lock()
        self._closed = False
        self._pending: Frame | None = None
        self._came = asyncio.Event()
        self._job: Job | None = None
        self._drawing = False
        self._drawer: asyncio.Task[None] | None = None
        self._spared = False  # the frame before left for a newer one: this one stays
        self._num_dropped = 0  # frames since the last picture
        self._slide = Slide()
        self._shown = Shown()
        self._next_at = 0.0

    async def run(self) -> None:
        """Until the client has gone; frees what was in flight."""
        self._drawer = asyncio.ensure_future(self._until_gone(self._draw()))
        ends = [self._drawer, asyncio.ensure_future(self._until_gone(self._read()))]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
            await asyncio.wait(ends)

    async def close(self, code: int, reason: str) -> None:
        """Say goodbye, which ends `run`; who does not read any more hears nothing of it."""
        try:
            async with asyncio.timeout(GOODBYE_S), self._sending:
                if not self._closed:
                    self._closed = True
                    await self._socket.close(code, reason)
        except (TimeoutError, RuntimeError, WebSocketDisconnect):  # it does not listen, or has gone
            pass
        if self._drawer is not None and self._drawer is not asyncio.current_task():
            self._drawer.cancel()

    async def _until_gone(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except WebSocketDisconnect:  # seen at a message to it
            pass
        except Exception:
            logger.exception("unforeseen error in a live session")
            await self.close(UNFORESEEN, "an error in this service; its log has the details")

    # -- in ----------------------------------------------------------------------------------

    async def _read(self) -> None:
        idle_s = self._replica.settings.live_idle_s
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    message = await self._socket.receive()
            except TimeoutError:
                if self._drawing or self._pending is not None:  # it waits for us
                    continue
                await self.close(SILENT, f"nothing came for {idle_s:g} s")
                return
            if message["type"] == "websocket.disconnect":
                return
            if (owner := self._owner()) is None:
                await self.close(REFUSED, "this API key is not known here any more")
                return
            self.tenant = owner
            data = message.get("bytes")
            try:
                await self._take(self._parse(message["text"] if data is None else data))
            except ServiceError as error:
                await self._send(error.body() | {"type": "error"})

    def _parse(self, data: bytes | str) -> SessionUpdate | Frame:
        limit = self._replica.settings.max_live_message_bytes
        if len(data) > limit:
            raise TooLarge(
                f"the message has {len(data)} bytes; at most {limit} are accepted, send smaller "
                "pictures"
            )
        return self._wire.read(data)

    async def _take(self, message: SessionUpdate | Frame) -> None:
        if isinstance(message, Frame):
            try:
                _check_fields(message.values)
            except BadRequest as error:
                await self._send_error(message, error)
            else:
                await self._offer(message)
            return
        _check_fields(message.values)
        values = self._values | message.values
        options, rest = messages.split_options(values)
        messages.options_of(options, self._replica.settings)
        params = self._params({"prompt": "…"} | rest, edits=True)  # it may come with a later one
        check_limits(params, self._replica.settings)
        self._values = values
        await self._send(self.describe())

    async def _offer(self, frame: Frame) -> None:
        replaced, self._pending = self._pending, frame
        self._came.set()
        if self._job is not None and not self._spared:
            self._replica.loop.supersede(self._job.request)
        if replaced is not None:
            await self._skip(replaced, "superseded")

    def describe(self) -> dict[str, Any]:
        """``session``: what holds here."""
        info, settings = self._replica.runner.info, self._replica.settings
        return {
            "type": "session",
            "id": self._id,
            "model": info.model_id,
            "window": 1,
            "values": self._values,
            "limits": {
                "max_fps": settings.live_max_fps,
                "idle_s": settings.live_idle_s,
                "max_num_inference_steps": settings.max_steps,
                "max_message_bytes": settings.max_live_message_bytes,
            },
        }

    # -- out ---------------------------------------------------------------------------------

    async def _draw(self) -> None:
        while True:
            self._drawing = False
            frame = await self._newest()
            self._drawing = True
            try:
                picture = await self._one(frame)
            except Cancelled:
                self._spared = True
                await self._skip(frame, "superseded")
            except (Overloaded, RateLimited) as error:
                await self._skip(frame, "shed")
                await asyncio.sleep(min(error.retry_after_s or MAX_WAIT_S, MAX_WAIT_S))
            except ServiceError as error:
                if isinstance(error, NotReady) and error.code != OUT_OF_MEMORY:
                    await self.close(RESTARTING, "this replica is restarting; come back")
                    return
                await self._send_error(frame, error)
            else:
                if picture is not None:
                    await self._send(picture)

    async def _newest(self) -> Frame:
        """The next frame to draw, at the session's pace."""
        await self._came.wait()
        now = self._replica.loop.clock()
        if now < self._next_at:
            await asyncio.sleep(self._next_at - now)  # whatever comes meanwhile is newer
        self._came.clear()
        frame, self._pending = self._pending, None
        assert frame is not None, "it has come"
        return frame

    async def _one(self, frame: Frame) -> dict[str, Any] | None:
        """The picture of a frame; None: it is like the last one, and was skipped.

        Raises:
            ServiceError: it cannot be drawn, or a newer one has come.
        """
        clock = self._replica.loop.clock
        begun = clock()
        given, values = messages.split_options(self._values | frame.values)
        options = messages.options_of(given, self._replica.settings)
        fps = min(options.max_fps, self._replica.settings.live_max_fps)
        self._next_at = begun + 1 / fps
        if frame.mask is not None and frame.image is None:
            name, of = self._wire.mask, self._wire.image
            raise BadRequest(f"{name} says what to edit of an image; send one in {of}", param=name)
        params = self._params(values, edits=frame.image is not None)
        check_limits(params, self._replica.settings)
        check_model(params.model, self._replica.runner.info.model_id, self._replica.settings)
        if self._replica.safety is not None:
            for text in filter(None, (params.prompt, options.prompt_b)):
                await in_worker(self._replica, self._replica.safety.check_prompt, text)
        deadline = begun + self._replica.settings.request_timeout_s
        prompt, blends = self._slide.next(params.prompt, options.prompt_blend)
        if options.prompt_b is not None and options.prompt_b_share:
            blends += (Blend(options.prompt_b, options.prompt_b_share),)
        started = params.model_copy(update={"prompt": prompt})
        prepare = functools.partial(self._prepare, frame, started, blends, options, values)
        look, admitted = await self._intake.decode(
            prepare, self._replica.settings.request_timeout_s
        )
        if admitted is None:
            await self._skip(frame, "similar")
            return None
        self._num_frames += 1
        job = Job(
            self._replica, admitted, AsImages(params, admitted, self._replica),
            request_id=f"{self._id}-{self._num_frames}", tenant=self.tenant, deadline=deadline,
            live=True,
        )  # fmt: skip
        async with job:
            self._job = job
            if self._pending is not None and not self._spared:
                self._replica.loop.supersede(job.request)
            try:
                image = [each async for each in job.items()][-1]
            finally:
                self._job = None
        self._spared = False
        self._shown.draw(look)
        self._replica.metrics.live_frame(clock() - begun)
        media_type = MEDIA_TYPES[params.output_format]
        return self._picture(frame, image, media_type, admitted, job)

    def _picture(
        self, frame: Frame, image: EncodedImage, media_type: str, admitted: Admitted, job: Job
    ) -> dict[str, Any]:
        dropped, self._num_dropped = self._num_dropped, 0
        return {
            "type": "frame",
            "id": frame.id,
            "image": image.data,
            "media_type": media_type,
            "width": admitted.width,
            "height": admitted.height,
            "seed": admitted.seed,
            "steps": admitted.num_steps,
            "timings": job.request.timings.milliseconds(),
            "dropped": dropped,
            "warnings": admitted.warnings,
        }

    def _prepare(
        self,
        frame: Frame,
        params: ImageParams,
        blends: tuple[Blend, ...],
        options: LiveOptions,
        values: dict[str, Any],
    ) -> tuple[Look, Admitted | None]:
        """In a worker: pixels and rows; no rows where the frame is like the picture shown."""
        max_px, wire = self._replica.settings.max_input_px, self._wire
        pictures = [
            decode_picture(messages.bytes_of(name, given), max_px=max_px, field=name)
            for name, given in ((wire.image, frame.image), (wire.mask, frame.mask))
            if given is not None
        ]
        edited = Edited.of(*pictures) if frame.image is not None else None
        look = Look.of(values, blends, edited)
        if self._shown.skip(look, options.similarity):
            return look, None
        admitted = admit(
            params, self._replica.runner, self._replica.settings, self.tenant, edited, blends
        )
        return look, admitted

    def _params(self, values: dict[str, Any], *, edits: bool) -> ImageParams:
        if not edits:
            values = {name: each for name, each in values.items() if name not in ONLY_EDITS}
        kind = EditParams if edits else GenerationRequest
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            raise bad_request(error, kind) from error

    async def _skip(self, frame: Frame, reason: str) -> None:
        self._num_dropped += 1
        self._replica.metrics.live_skipped(reason)
        await self._send({"type": "skipped", "id": frame.id, "reason": reason})

    async def _send_error(self, frame: Frame, error: ServiceError) -> None:
        await self._send(error.body() | {"type": "error", "id": frame.id})

    async def _send(self, message: dict[str, Any]) -> None:
        """Waits for a client that does not read, as long as for one that says nothing.

        Raises:
            WebSocketDisconnect: it has gone, or has read nothing for so long.
        """
        try:
            async with asyncio.timeout(self._replica.settings.live_idle_s), self._sending:
                if self._closed:
                    raise WebSocketDisconnect
                data = self._wire.write(message)
                if isinstance(data, bytes):
                    await self._socket.send_bytes(data)
                elif data is not None:
                    await self._socket.send_text(data)
        except (TimeoutError, RuntimeError):  # the latter is Starlette's of who is known to be gone
            raise WebSocketDisconnect from None


def _check_fields(values: dict[str, Any]) -> None:
    for name in values:
        if name not in FIELDS:
            raise BadRequest(
                f"unknown field {name[:80]!r}; a live session has {', '.join(FIELDS)}",
                param=name[:80],
                code="unknown_parameter",
            )
