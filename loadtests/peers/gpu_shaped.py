"""Fourstep over an engine that only takes its time: what Ray Serve imports for `--gpu-shaped`."""

from __future__ import annotations

from typing import Any

from ray import serve

from loadtests.peers.fourstep import MAX_WAITING
from loadtests.peers.sleeping import open_sleeping
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from service.web.logs import configure_logs


@serve.deployment(name="fourstep", max_ongoing_requests=MAX_WAITING)
@serve.ingress()
class GpuShaped:
    """The product's replica and app over the sleeping engine."""

    def __init__(self, values: dict[str, Any]) -> None:
        settings = load_settings(values)
        configure_logs(settings.log_level)
        self.replica = Replica(
            settings,
            lambda settings: open_sleeping(
                settings.model, settings.cache_dir, settings.engine, settings.max_batch or None
            ),
        )

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self.replica, behind_ray=True)


def build_gpu_shaped(args: dict[str, Any]) -> serve.Application:
    values = dict(args)
    deployment: Any = GpuShaped
    replicas = values.pop("num_replicas", 1)
    options = deployment.options(num_replicas=replicas, ray_actor_options={"num_cpus": 1})
    return options.bind(values)
