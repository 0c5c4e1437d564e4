"""Where live sessions come in: the WebSocket, its tokens, and how many there may be."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable

from fastapi import FastAPI, Request, WebSocket
from pydantic import BaseModel, Field

from service.access.keys import KeyRing, bearer_of, digest_of, tenant_of
from service.access.quota import Tenant
from service.access.tokens import LIFE_S, digest_of_token, make_token
from service.errors import ServiceError, Unauthorized
from service.replica import Replica
from service.settings import Settings
from service.web.intake import Intake
from service.web.live.fal import Fal
from service.web.live.messages import PROTOCOL, Plain, Wire
from service.web.live.session import REFUSED, RESTARTING, LiveSession

FULL = 1013
PATH = "/v1/realtime/images"
FAL_PATH = "/{model:path}/realtime"
FAL_TOKEN = "fal_jwt_token"
MOVED = "this replica is shutting down; come back, to another"


class LiveToken(BaseModel):
    """What opens a session without the key itself."""

    token: str = Field(description="For `GET /v1/realtime/images?token=`. Empty: none is needed.")
    expires_in: int = Field(description="Seconds in which a session can be opened by it.")


class LiveSessions:
    """Those that are open on this replica: of one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open: set[LiveSession] = set()
        self._event_loop: asyncio.AbstractEventLoop | None = None  # of the first one
        self._goodbyes: asyncio.Future[list[BaseException | None]] | None = None
        self.draining = False

    def refusal(self, tenant: Tenant) -> str | None:
        """Why there is no room for one more; None: there is."""
        limit, own = self._settings.max_live_sessions, self._settings.max_live_sessions_of_key
        if not limit:
            return "live drawing is off here (max_live_sessions is 0)"
        if len(self._open) >= limit:
            return f"{limit} live sessions are open here, which is all there may be; try again"
        by_tenant = Counter(session.tenant.name for session in self._open)
        if tenant.name and by_tenant[tenant.name] >= own:
            return f"this API key has {own} live sessions open, which is all it may have"
        return None

    def add(self, session: LiveSession) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._open.add(session)

    def remove(self, session: LiveSession) -> None:
        self._open.discard(session)

    def drain(self) -> None:
        """Send all of them to another replica, and take no more. From any thread."""
        self.draining = True
        if self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._close_all)

    def _close_all(self) -> None:
        goodbyes = [session.close(RESTARTING, MOVED) for session in self._open]
        self._goodbyes = asyncio.gather(*goodbyes, return_exceptions=True)

    def __len__(self) -> int:
        return len(self._open)


def add_live_routes(app: FastAPI, replica: Replica, intake: Intake, keys: KeyRing | None) -> None:
    """Routes of one replica; without ``keys`` everybody may draw."""
    sessions = LiveSessions(replica.settings)
    replica.when_draining(sessions.drain)

    @app.post("/v1/realtime/tokens")
    async def tokens(request: Request) -> LiveToken:
        """A token that opens live sessions for a minute, for browsers."""
        token = make_token(keys, bearer_of(request.headers)) if keys is not None else ""
        return LiveToken(token=token, expires_in=LIFE_S)

    async def run(socket: WebSocket, wire: Wire) -> None:
        try:
            _check_origin(socket, replica.settings)
            owner = _owner(socket, keys)
        except Unauthorized as error:
            await socket.close(REFUSED, _reason(error))
            return
        if sessions.draining or not replica.ready:
            await socket.close(RESTARTING, MOVED)
            return
        session = LiveSession(socket, replica, intake, owner, wire)
        if (refusal := sessions.refusal(session.tenant)) is not None:
            await socket.close(FULL, refusal)
            return
        sessions.add(session)
        replica.metrics.live_sessions(len(sessions))
        try:
            await session.run()
        finally:
            sessions.remove(session)
            replica.metrics.live_sessions(len(sessions))

    @app.websocket(PATH)
    async def live(socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols", ())
        await socket.accept(PROTOCOL if PROTOCOL in offered else None)
        await run(socket, Plain())

    @app.websocket(FAL_PATH)
    async def as_fal_has_it(socket: WebSocket, model: str) -> None:
        await socket.accept()
        await run(socket, Fal(model))


def _check_origin(socket: WebSocket, settings: Settings) -> None:
    """A page of elsewhere may open a WebSocket where it could send no request: browsers ask nobody.

    Raises:
        Unauthorized: it is of an origin that is neither this service's own nor a known one.
    """
    origin = socket.headers.get("origin")
    own = origin is not None and origin.partition("://")[2] == socket.headers.get("host")
    if origin is None or own or {origin, "*"} & set(settings.cors_origins):
        return
    raise Unauthorized(
        f"pages of {origin[:60]} may not draw here; cors_origins names those who may"
    )


def _owner(socket: WebSocket, keys: KeyRing | None) -> Callable[[], Tenant | None]:
    """Says whose the key is that was sent, or that a token stands for; None: nobody's any more.

    Raises:
        Unauthorized: neither came, or none that is known.
    """
    if keys is None:
        return Tenant
    asked = socket.query_params
    token = asked.get("token", asked.get(FAL_TOKEN))
    if token is not None:
        digest = digest_of_token(keys, token)
    else:
        tenant_of(keys, socket.headers)
        digest = digest_of(bearer_of(socket.headers))
    return functools.partial(keys.owner_by, digest)


def _reason(error: ServiceError) -> str:
    """As much as a close frame holds: 123 bytes."""
    return error.message.encode()[:120].decode(errors="ignore")
