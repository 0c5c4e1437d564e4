"""How many GPUs a replica of `fourstep serve` gets: one of its own, where its engine draws by one.

Without that Ray gives a replica none, or all of them the first. On a cluster `num_gpus` stands in
the application's ``args``, for what builds it there may have no GPU to look at.
"""

from __future__ import annotations

import dataclasses

from engines.backends.choice import Machine, choose_backend, draws_on_gpu
from service.ray_serve.machine import ServeError
from service.ray_serve.scaling import split_args
from service.ray_serve.serve_config import Application, ServeConfig


def place(config: ServeConfig, machine: Machine) -> ServeConfig:
    """The config with ``num_gpus`` filled in for each application that does not say it.

    Raises:
        ServeError: the replicas want more GPUs than there are.
    """
    applications = tuple(_placed(app, machine) for app in config.applications)
    num_replicas, num_gpus = 0, 0.0
    for app in applications:
        scaling, _ = split_args(app.args)
        if scaling.num_gpus:
            num_replicas += app.max_replicas
            num_gpus += app.max_replicas * scaling.num_gpus
    if num_gpus > machine.num_gpus:
        raise ServeError(
            f"{num_replicas} replica(s) take {num_gpus:g} GPU(s) and this machine has "
            f"{machine.num_gpus}; serve fewer (--replicas), let them share (num_gpus: 0.5 in the "
            "args of a --config), or draw on the CPU (--device cpu)"
        )
    return dataclasses.replace(config, applications=applications)


def _placed(app: Application, machine: Machine) -> Application:
    settings = app.settings
    backend = choose_backend(settings.engine, machine, device=settings.device).backend
    if "num_gpus" in app.args or not draws_on_gpu(backend, machine, settings.device):
        return app
    return dataclasses.replace(app, args={**app.args, "num_gpus": 1})
