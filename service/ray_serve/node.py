"""Ray's node, as a service needs it: not waiting for its agents, and not reached by our signals.

A raylet ends itself where an agent does not name its port in a file within 15 s, which no setting
of Ray changes, and a busy machine makes them late. So the agents get ports that were chosen before,
and the raylet is told of them before it starts.

A raylet that gets SIGTERM kills its workers, our replicas, with what they draw. So Ray's processes
are in groups of their own, where a signal to our process group does not reach them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from service.ray_serve.environment import hold_port
from service.ray_serve.machine import ServeError
from service.ray_serve.output import Output

# As Ray calls them, for its function and for its files.
METRICS_PORTS = ("metrics_agent_port", "metrics_export_port")
OTHER_PORTS = ("dashboard_agent_listen_port", "runtime_env_agent_port")
WITHOUT_METRICS = {"RAY_enable_metrics_collection": "0"}
NO_PORT = -1  # in such a file: nobody serves there

_held: list[socket.socket] = []  # ours while this process lives


def start_ray(num_cpus: int, num_gpus: int, output: Output) -> None:
    """A node of this machine alone; ``output`` shows what its processes write.

    Raises:
        ServeError: it did not start.
    """
    import ray

    output.begin()
    try:
        with amended():
            ray.init(
                address="local",  # never a cluster that RAY_ADDRESS names: this is one machine
                num_cpus=num_cpus,
                num_gpus=num_gpus,  # those that torch sees: what Ray seeks, a container may lack
                include_dashboard=False,
                logging_level="ERROR",
                configure_logging=True,
            )
    except Exception as error:  # Ray raises bare Exception here, when a busy machine starts slowly
        what = str(error).strip().splitlines()[-1]
        raise ServeError(f"Ray did not start ({what}); is the machine overloaded?") from error


@contextlib.contextmanager
def amended() -> Iterator[None]:
    """Every node that Ray starts in this process meanwhile has its agents' ports given, and a
    process group for each of its processes.

    Nobody else finds the ports free until this process ends, however late an agent comes to its
    own.
    """
    from ray._private import services

    start_raylet, start_process = services.start_raylet, services.ConsolePopen
    services.start_raylet = functools.partial(_start_raylet, start_raylet)
    if sys.platform == "linux":  # elsewhere Ray ends them by the group that they share with us
        services.ConsolePopen = functools.partial(start_process, process_group=0)
    try:
        yield
    finally:
        services.start_raylet, services.ConsolePopen = start_raylet, start_process


def _start_raylet(start_raylet: Any, *args: Any, **options: Any) -> Any:
    """Ray's function of that name, with the ports that its caller leaves open."""
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray._raylet import persist_port  # type: ignore[attr-defined]

    call = inspect.signature(start_raylet).bind(*args, **options).arguments
    named: dict[str, int] = {}
    without_metrics = WITHOUT_METRICS.items() <= os.environ.items()
    for name in (*METRICS_PORTS, *OTHER_PORTS):
        if call.get(name, 0) not in (0, DEFAULT_DASHBOARD_AGENT_LISTEN_PORT):
            named[name] = call[name]
        elif name in METRICS_PORTS and without_metrics:
            named[name] = NO_PORT  # else all processes would look for an agent that is late
        else:
            named[name] = call[name] = _reserved_port()
    for name, port in named.items():  # not all are on the raylet's command line
        persist_port(call["session_dir"], call["node_id"], name, port)
    return start_raylet(**call)


def _reserved_port() -> int:
    """Held where that is in no server's way."""
    held = hold_port()
    port: int = held.getsockname()[1]
    if sys.platform == "linux":
        _held.append(held)
    else:
        held.close()
    return port
