"""A number of replicas or a range: what Ray is told, what is refused and how it is said."""

from __future__ import annotations

from typing import Any

import pytest

from engines.drawing.batching import FULL_BATCH
from service.ray_serve.scaling import NOT_AUTOSCALING, Scaling, split_args
from service.settings import SettingsError, load_settings


def autoscaling_of(args: dict[str, Any]) -> dict[str, Any] | None:
    scaling, values = split_args(args)
    return scaling.autoscaling(load_settings(values))


def test_a_number_of_replicas_is_not_autoscaled() -> None:
    assert autoscaling_of({"num_replicas": 2, "max_batch": 4}) is None
    assert split_args({"num_replicas": 2})[0].largest == 2
    assert split_args({})[0].largest == 1


@pytest.mark.parametrize(
    ("args", "target"),
    [
        ({}, FULL_BATCH),
        ({"num_gpus": 1, "engine": "onnxruntime"}, FULL_BATCH),
        ({"num_gpus": 0.5, "engine": "tensorrt", "max_batch": 12}, 12),
        ({"num_gpus": 1, "target_ongoing_requests": 3.5}, 3.5),
    ],
)
def test_the_target_is_one_full_batch_unless_given(args: dict[str, Any], target: float) -> None:
    config = autoscaling_of({"max_replicas": 4} | args)
    assert config == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": target}


def test_ray_takes_every_key_by_its_name() -> None:
    from ray.serve.config import AutoscalingConfig

    given = {
        "min_replicas": 0,
        "max_replicas": 3,
        "initial_replicas": 2,
        "target_ongoing_requests": 5.0,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 2.0,
        "downscale_to_zero_delay_s": 3.0,
        "upscaling_factor": 0.8,
        "downscaling_factor": 0.3,
        "look_back_period_s": 20.0,
    }
    config = autoscaling_of(given | {"num_gpus": 1, "num_cpus": 2})
    assert config == given
    assert set(given) == set(Scaling.model_fields) - NOT_AUTOSCALING
    assert AutoscalingConfig(**config).model_dump(include=set(given)) == given


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_replicas": "auto"}, r"'num_replicas': .*valid integer.*got 'auto'"),
        ({"num_replicas": 0}, r"'num_replicas': .*greater than or equal to 1, got 0"),
        ({"max_replicas": 0}, r"'max_replicas': .*greater than or equal to 1, got 0"),
        ({"min_replicas": 1}, "min_replicas is for autoscaling, which needs max_replicas too"),
        ({"upscale_delay_s": 1}, "upscale_delay_s is for autoscaling, which needs max_replicas"),
        ({"num_replicas": 2, "max_replicas": 3}, "num_replicas is 2 and max_replicas 3: give a"),
        ({"min_replicas": 4, "max_replicas": 3}, "min_replicas is 4 and must be at most .*, 3"),
        ({"max_replicas": 3, "initial_replicas": 4}, "initial_replicas is 4 .* 1, to max_.*, 3"),
        (
            {"min_replicas": 2, "max_replicas": 3, "initial_replicas": 1},
            "initial_replicas is 1 and must be from min_replicas, 2, to max_replicas, 3",
        ),
        ({"max_replicas": 3, "downscale_to_zero_delay_s": 9}, "needs min_replicas 0, which is 1"),
        ({"max_replicas": 3, "upscale_delay_s": -1}, r"'upscale_delay_s': .*equal to 0, got -1"),
        ({"max_replica": 3}, "unknown setting 'max_replica'; did you mean 'max_replicas'"),
        ({"max_bach": 3}, "unknown setting 'max_bach'; did you mean 'max_batch'"),
    ],
)
def test_what_is_refused_names_the_way_out(args: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        autoscaling_of(args)
