"""Fourstep itself, as `fourstep serve` serves it; `--gpu-shaped` changes the engine and no more."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

from ray import serve

from loadtests.peers.drawing import Options
from loadtests.peers.sleeping import open_sleeping
from service.ray_serve.serve import serve_here
from service.ray_serve.serve_config import IMPORT_PATH, Application, ServeConfig
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from service.web.logs import configure_logs

MAX_WAITING = 10_000  # nothing is refused: what waits is what is measured


@serve.deployment(name="fourstep", max_ongoing_requests=MAX_WAITING)
@serve.ingress()
class GpuShaped:
    """The product's replica and app over the sleeping engine."""

    def __init__(self, values: dict[str, Any]) -> None:
        settings = load_settings(values)
        configure_logs(settings.log_level)
        self.replica = Replica(
            settings, lambda settings: open_sleeping(settings.model, settings.cache_dir)
        )

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self.replica, behind_ray=True)


def build_gpu_shaped(args: dict[str, Any]) -> serve.Application:
    values = dict(args)
    deployment: Any = GpuShaped
    replicas = values.pop("num_replicas", 1)
    options = deployment.options(num_replicas=replicas, ray_actor_options={"num_cpus": 1})
    return options.bind(values)


def main(options: Options) -> int:
    """Serve until SIGINT or SIGTERM."""
    args = {"model": options.model, "cache_dir": str(options.cache_dir), "engine": "onnxruntime"}
    app = Application("fourstep", "/", args | {"num_replicas": options.workers})
    os.environ.setdefault("FOURSTEP_MAX_WAITING", str(MAX_WAITING))
    if options.num_threads:
        os.environ.setdefault("FOURSTEP_NUM_THREADS", str(options.num_threads))
    path = "loadtests.peers.fourstep:build_gpu_shaped" if options.gpu_shaped else IMPORT_PATH
    app = dataclasses.replace(app, import_path=path)
    return serve_here(ServeConfig((app,)), host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    sys.exit(main(Options.parse()))
