"""One GPU a replica under `fourstep serve`, on machines that are not this one."""

from __future__ import annotations

from typing import Any

import pytest

from engines.backends.choice import Machine
from service.ray_serve.machine import ServeError
from service.ray_serve.placement import place
from service.ray_serve.scaling import split_args
from service.ray_serve.serve_config import Application, ServeConfig

PACKAGES = frozenset({"onnxruntime", "torch", "tensorrt"})
CPU = Machine(None, PACKAGES)
TWO = Machine(90, PACKAGES, "NVIDIA H200", 2)


def gpus_of(machine: Machine, *args: dict[str, Any]) -> list[float]:
    apps = (Application(str(k), f"/{k}", each) for k, each in enumerate(args))
    placed = place(ServeConfig(tuple(apps)), machine)
    return [split_args(app.args)[0].num_gpus for app in placed.applications]


@pytest.mark.parametrize(
    ("machine", "args", "num_gpus"),
    [
        (TWO, {}, 1),
        (TWO, {"engine": "torch", "num_replicas": 2}, 1),
        (TWO, {"engine": "tensorrt"}, 1),
        (TWO, {"num_gpus": 0.5, "num_replicas": 4}, 0.5),
        (TWO, {"num_gpus": 0}, 0),
        (TWO, {"engine": "torch", "device": "cpu", "num_replicas": 9}, 0),
        (TWO, {"engine": "onnxruntime", "num_replicas": 9}, 0),
        (CPU, {"num_replicas": 9}, 0),
        (CPU, {"engine": "torch"}, 0),
    ],
)
def test_a_replica_has_a_gpu_where_it_draws_by_one(
    machine: Machine, args: dict[str, Any], num_gpus: float
) -> None:
    assert gpus_of(machine, args) == [num_gpus]


def test_applications_are_counted_together() -> None:
    assert gpus_of(TWO, {}, {"device": "cpu"}, {"engine": "torch"}) == [1, 0, 1]
    with pytest.raises(ServeError, match=r"3 replica\(s\) take 3 GPU\(s\) and this machine has 2"):
        gpus_of(TWO, {}, {"num_replicas": 2})


@pytest.mark.parametrize("args", [{"num_replicas": 3}, {"max_replicas": 3}])
def test_more_replicas_than_gpus_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ServeError, match=r"serve fewer \(--replicas\).*num_gpus: 0.5.*cpu"):
        gpus_of(TWO, args)
