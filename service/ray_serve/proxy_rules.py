"""What HAProxy does before a request reaches a replica: how long it waits for a client, how much it
takes of one, which headers it lets by, and its own words where it answers itself.

Text of HAProxy's configuration alone; `service.ray_serve.haproxy` puts it where it belongs.
"""

from __future__ import annotations

import json

from service.web.headers import ALWAYS, MAX_REQUEST_ID_CHARS, NO_STORE

HEAD_TIMEOUT_S = 10  # a request's line and headers, the first byte included
BODY_TIMEOUT_S = 30  # a body up to the first MiB: 280 kbit/s
# A client that neither sends what it has begun nor takes what it is sent. Waiting for an answer, a
# stream's next event included, is not idle.
IDLE_TIMEOUT_S = 30
TUNNEL_TIMEOUT_S = 120  # WebSockets: the service pings every 20 s, and a client answers
MAX_HEAD_BYTES = 32 * 1024  # line and headers; browsers and proxies stay within 16 KiB
MAX_URL_BYTES = 4096
RESERVED_CONNECTIONS = 64  # of all: for probes, scrapes and Ray's own
# Headers that Ray acts upon and we do not offer: a deadline of its own, the choice of a model, the
# choice of a replica.
RAYS_OWN = (
    "x[-_]request[-_]timeout[-_]seconds",
    "serve[-_]multiplexed[-_]model[-_]id",
    "x[-_]session[-_]id",
)
# WebSockets are not compressed: pictures are by themselves, and what unpacks to megabytes would do
# so before the service has seen its size.
COMPRESSION = "sec[-_]websocket[-_]extensions"
PROBES = ("/healthz", "/readyz", "/metrics")

SECURITY = {name.decode(): value.decode() for name, value in ALWAYS.items()} | {
    NO_STORE[0].decode(): NO_STORE[1].decode()
}


def _error(code: str, message: str, *, kind: str = "invalid_request_error") -> str:
    """The body of an answer in OpenAI's error shape."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error})


def _answer(status: int, body: str, *, again: bool = False) -> str:
    """HAProxy's words for an answer; with ``again``, to be tried again after a second.

    ``body`` may hold HAProxy's ``%[...]``.
    """
    form = "lf-string" if "%[" in body else "string"
    then = " hdr retry-after 1" if again else ""
    return f"status {status} content-type application/json {form} '{body}'{then}"


_SERVER = "server_error"
_LATE = "timeout_error"
# Of what is no request at all HAProxy says 400 or 408 in words of its own, which cannot be changed.
ERRORS = "\n".join(
    f"    http-error {answer}"
    for answer in (
        _answer(
            400,
            _error("invalid_value", "the request is not HTTP/1.1, or did not come to its end"),
        ),
        _answer(
            408,
            _error(
                "timeout",
                f"the body did not come within {BODY_TIMEOUT_S} s, up to its first MiB; send it "
                "again",
                kind=_LATE,
            ),
            again=True,
        ),
        _answer(500, _error("engine_failure", "an error in the proxy; try again", kind=_SERVER)),
        _answer(
            502,
            _error(
                "replica_lost",
                "the replica that drew this is gone and the request is too large for the proxy to "
                "send it to another; try again",
                kind=_SERVER,
            ),
            again=True,
        ),
        _answer(
            503,
            _error("not_ready", "no replica can take this request now; try again", kind=_SERVER),
            again=True,
        ),
        _answer(
            504,
            _error("timeout", "the replica has not answered; try again", kind=_LATE),
            again=True,
        ),
    )
)
STARTING = _answer(
    503,
    _error("not_ready", "no application is running yet; try again", kind=_SERVER),
    again=True,
)
UNKNOWN = _answer(
    404,
    _error(
        "not_found", "no application is served at %[path,json(utf8s)]; GET /-/routes lists them"
    ),
)
_NO_PROBE = _answer(404, _error("not_found", f"this port answers {', '.join(PROBES)} alone"))
_LONG_URL = _answer(
    414,
    _error(
        "too_large", f"the URL has more than {MAX_URL_BYTES} bytes; send what it holds in the body"
    ),
)
_LARGE_HEAD = _answer(
    431,
    _error(
        "too_large",
        f"the headers have more than {MAX_HEAD_BYTES} bytes; send fewer or shorter ones",
    ),
)

TIMEOUTS = f"""\
    timeout client {IDLE_TIMEOUT_S}s
    timeout http-request {HEAD_TIMEOUT_S}s
    timeout tunnel {TUNNEL_TIMEOUT_S}s"""


def front(maxconn: int) -> str:
    """Rules of the listener for clients, of ``maxconn`` connections in all of HAProxy.

    One address has half of what there is at most: the rest waits for nobody behind it.
    """
    most = maxconn - RESERVED_CONNECTIONS
    return f"""\
    maxconn {most}
    stick-table type ipv6 size 100k expire 1m store conn_cur
    tcp-request connection track-sc0 src
    tcp-request connection reject if {{ sc_conn_cur(0) gt {most // 2} }}
{_REQUESTS}"""


def probes(address: str, routes: str) -> str:
    """A listener of its own for probes and scrapes; ``routes`` are the main one's."""
    return f"""\
frontend probes
    bind {address} proto h1
    maxconn {RESERVED_CONNECTIONS // 2}
    timeout client {HEAD_TIMEOUT_S}s
    timeout http-keep-alive {HEAD_TIMEOUT_S}s
{_REQUESTS}
    http-request return {_NO_PROBE} unless {{ path_end {" ".join(PROBES)} }}
{routes}"""


_ANSWERS = "\n".join(
    f'    http-after-response set-header {name} "{value}" unless {{ res.hdr({name}) -m found }}'
    for name, value in {**SECURITY, "x-request-id": "%[var(txn.request_id)]"}.items()
)
# A request id of the client's is kept where it is one in form, and Ray's words never see another.
_REQUESTS = f"""\
    unique-id-format req_%[uuid]
    acl has_own_id req.fhdr(x-request-id) -m reg ^[!-~]{{1,{MAX_REQUEST_ID_CHARS}}}$
    acl has_one_id req.fhdr_cnt(x-request-id) eq 1
    http-request set-header x-request-id %[unique-id] unless has_own_id has_one_id
    http-request set-var(txn.request_id) req.fhdr(x-request-id)
{_ANSWERS}
    http-request return {_LONG_URL} if {{ url -m len gt {MAX_URL_BYTES} }}
    http-request return {_LARGE_HEAD} if {{ req.hdrs -m len gt {MAX_HEAD_BYTES} }}
    http-request del-header ^({"|".join((*RAYS_OWN, COMPRESSION))})$ -m reg
    http-request wait-for-body time {BODY_TIMEOUT_S}s"""
