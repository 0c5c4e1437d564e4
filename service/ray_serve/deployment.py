"""Ray Serve: one deployment whose replica is itself the HTTP ingress. The only module with ``ray``.

``service.ray_serve.deployment:build`` is the ``import_path`` of every application, on one machine
and in a KubeRay RayService alike; its ``args`` are `service.settings.Settings` and
`service.ray_serve.scaling.Scaling`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray import serve

from service.ray_serve.scaling import split_args
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from service.web.logs import configure_logs

# Admission control is the application's own (429 with Retry-After); Ray must not queue before it.
MAX_ONGOING_REQUESTS = 10_000
# Ray kills a replica whose check_health fails three times in a row, and what it had in hand is sent
# to another. By its own 10 s and 30 s the clients of a hung one would wait for two minutes.
HEALTH_CHECK_PERIOD_S = 2
HEALTH_CHECK_TIMEOUT_S = 5


@serve.deployment(
    name="fourstep",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    health_check_period_s=HEALTH_CHECK_PERIOD_S,
    health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
)
@serve.ingress()
class FourstepDeployment:
    """One replica, one engine, loaded before Ray calls it ready.

    Loaded in the constructor, not in the ASGI lifespan: of an error there Ray keeps no message.
    """

    async def __init__(self, values: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        settings = load_settings(values)
        configure_logs(settings.log_level)
        close_port_for_deployments()
        self.replica = Replica(settings)
        call_when_draining(self.replica.drain)
        await asyncio.to_thread(self.replica.start)

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self.replica, behind_ray=True)

    def check_health(self) -> None:
        """Ray replaces the replica when an engine thread is gone, or in a call without end."""
        if self.replica.started and not self.replica.ready:
            raise RuntimeError("the engine is not serving")


def close_port_for_deployments() -> None:
    """Have the replica that Ray makes in this process take no calls of other deployments.

    Ray opens a port for them, on all interfaces whatever the host, and unpickles what it is sent.
    There are no others here, and Ray's own proxy calls replicas another way
    (RAY_SERVE_USE_GRPC_BY_DEFAULT). To be called before Ray has initialized the replica.

    Raises:
        AttributeError: this version of Ray opens the port in a way not known here.
    """
    from ray.serve._private import replica

    _ = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: 0


def call_when_draining(drain: Callable[[], None]) -> None:
    """Have the replica that Ray makes in this process call ``drain`` before it waits for what is
    open to end: a WebSocket does so only when it is told.

    Raises:
        AttributeError: this version of Ray shuts replicas down in a way not known here.
    """
    from ray.serve._private import replica

    shut_down = replica.Replica._perform_graceful_shutdown

    async def drain_first(ray_replica: Any) -> None:
        drain()
        await shut_down(ray_replica)

    replica.Replica._perform_graceful_shutdown = drain_first


def build(args: dict[str, Any]) -> serve.Application:
    """The application of one model.

    Args:
        args: by name, the settings and the scaling: ``num_replicas`` (default 1), or
            ``max_replicas`` and what its autoscaling goes by; ``num_gpus`` and ``num_cpus`` of a
            replica (default 0 and 1).

    Raises:
        SettingsError: an unknown or refused setting.
    """
    scaling, values = split_args(args)
    settings = load_settings(values)  # refuse a wrong key here, not in a replica's log
    autoscaling = scaling.autoscaling(settings)
    size = {"autoscaling_config": autoscaling} if autoscaling else {"num_replicas": scaling.largest}
    deployment: Any = FourstepDeployment  # the decorators' types are lost on mypy
    return deployment.options(
        **size,
        max_surge_percent=scaling.max_surge_percent,
        ray_actor_options={"num_gpus": scaling.num_gpus, "num_cpus": scaling.num_cpus},
        graceful_shutdown_timeout_s=settings.drain_s + 10,
    ).bind(values)
