"""How many replicas an application has, and what each of them takes: a number, or a range.

Read from an application's ``args`` beside the settings. Knows no Ray; `deployment` hands the
outcome over to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engines.drawing.batching import FULL_BATCH
from service.settings import Settings, SettingsError

NOT_AUTOSCALING = {"num_replicas", "max_surge_percent", "num_gpus", "num_cpus"}


class Scaling(BaseModel):
    """``num_replicas``, or ``max_replicas`` with what Ray Serve's autoscaler is to go by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_replicas: int | None = Field(None, ge=1, description="a fixed number; default 1")
    min_replicas: int | None = Field(None, ge=0, description="default 1; 0: none without load")
    max_replicas: int | None = Field(None, ge=1, description="makes it a range, autoscaled")
    # An application runs, and gets traffic, when all of these do. An upgrade under load needs it.
    initial_replicas: int | None = Field(
        None, ge=0, description="at first and after each change of the config; default min_replicas"
    )
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="requests a replica has in hand; default: one full batch of images"
    )
    # None: Ray's own, 30 s, 600 s, as downscale_delay_s, and 30 s.
    upscale_delay_s: float | None = Field(None, ge=0, description="above target, before one starts")
    downscale_delay_s: float | None = Field(None, ge=0, description="below it, before one stops")
    downscale_to_zero_delay_s: float | None = Field(None, ge=0, description="the same for the last")
    upscaling_factor: float | None = Field(None, gt=0, description="of a step up that is taken")
    downscaling_factor: float | None = Field(None, gt=0, description="of a step down; Ray's own: 1")
    look_back_period_s: float | None = Field(None, gt=0, description="requests are averaged over")
    # Kubernetes' own default. 0 stops a replica before its successor is ready: with one replica,
    # requests wait while the model loads. Above 0 there must be room (a GPU) for the surplus.
    max_surge_percent: int = Field(25, ge=0, le=100, description="more replicas during an update")
    num_gpus: float = Field(0, ge=0, description="of one replica")
    num_cpus: float = Field(1, ge=0, description="of one replica")

    @property
    def largest(self) -> int:
        """The most replicas there can be at one time."""
        return self.max_replicas or self.num_replicas or 1

    @model_validator(mode="after")
    def _a_number_or_a_range(self) -> Scaling:
        if self.max_replicas is None:
            for name in self.model_dump(exclude=NOT_AUTOSCALING, exclude_none=True):
                raise ValueError(f"{name} is for autoscaling, which needs max_replicas too")
            return self
        if self.num_replicas is not None:
            raise ValueError(
                f"num_replicas is {self.num_replicas} and max_replicas {self.max_replicas}: "
                "give a fixed number or a range, not both"
            )
        least = 1 if self.min_replicas is None else self.min_replicas
        if least > self.max_replicas:
            raise ValueError(
                f"min_replicas is {least} and must be at most max_replicas, {self.max_replicas}"
            )
        first = least if self.initial_replicas is None else self.initial_replicas
        if not least <= first <= self.max_replicas:
            raise ValueError(
                f"initial_replicas is {first} and must be from min_replicas, {least}, to "
                f"max_replicas, {self.max_replicas}"
            )
        if self.downscale_to_zero_delay_s is not None and least > 0:
            raise ValueError(
                f"downscale_to_zero_delay_s needs min_replicas 0, which is {least} here"
            )
        return self

    def autoscaling(self, settings: Settings) -> dict[str, Any] | None:
        """Ray Serve's ``autoscaling_config``; None for a fixed number of replicas."""
        if self.max_replicas is None:
            return None
        # Images that fill a denoise call: with fewer, lanes are empty; with more, rows wait.
        target = settings.max_batch or FULL_BATCH
        config = {"min_replicas": 1, "target_ongoing_requests": target}
        return config | self.model_dump(exclude=NOT_AUTOSCALING, exclude_none=True)


def split_args(args: Mapping[str, Any]) -> tuple[Scaling, dict[str, Any]]:
    """An application's ``args`` as its scaling and the values of its settings.

    Raises:
        SettingsError: a refused value, or an unknown key that is nearest to one of `Scaling`.
    """
    own = {key: value for key, value in args.items() if key in Scaling.model_fields}
    values = {key: value for key, value in args.items() if key not in own}
    for key in values.keys() - Settings.model_fields.keys():
        known = (*Scaling.model_fields, *Settings.model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        if near and near[0] in Scaling.model_fields:
            raise SettingsError(f"unknown setting {key!r}; did you mean {near[0]!r}?")
    try:
        return Scaling(**own), values
    except ValidationError as error:
        raise SettingsError("; ".join(map(_line, error.errors()))) from error


def _line(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return str(message)
    return f"setting {error['loc'][0]!r}: {message.lower()}, got {error['input']!r}"
