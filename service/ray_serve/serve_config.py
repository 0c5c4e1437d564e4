"""What `fourstep serve` is to serve: one model, or the applications of a Ray Serve config file."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from service.ray_serve.machine import ServeError
from service.ray_serve.scaling import split_args
from service.settings import Settings, load_settings

IMPORT_PATH = "service.ray_serve.deployment:build"
HONOURED = {"name", "route_prefix", "import_path", "args"}  # of an application in a config file


@dataclass(frozen=True, slots=True)
class Application:
    """One model behind one route; ``import_path`` names the function that builds it."""

    name: str
    route_prefix: str
    args: dict[str, Any]
    import_path: str = IMPORT_PATH

    @property
    def max_replicas(self) -> int:
        """The most replicas it may have at one time."""
        return split_args(self.args)[0].largest

    @property
    def settings(self) -> Settings:
        """Raises `SettingsError` for an unknown or refused one."""
        return load_settings(split_args(self.args)[1])

    def build(self) -> Any:
        """The Ray Serve application. Imports Ray, so its environment must stand by then."""
        module, _, function = self.import_path.partition(":")
        return getattr(importlib.import_module(module), function)(self.args)


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """``ignored`` names what a config file holds for a cluster and this command leaves aside."""

    applications: tuple[Application, ...]
    ignored: tuple[str, ...] = ()

    @classmethod
    def of_one(cls, args: dict[str, Any]) -> ServeConfig:
        return cls((Application("fourstep", "/", args),))

    @classmethod
    def from_file(cls, path: Path) -> ServeConfig:
        """Read a Ray Serve config file, the same that a RayService's ``serveConfigV2`` holds.

        Imports Ray, as `Application.build` does.

        Raises:
            ServeError: not readable, not of Ray's schema, or an application of another kind.
        """
        from pydantic import ValidationError
        from ray.serve.schema import ServeDeploySchema

        try:
            values = yaml.safe_load(path.read_text())
            schema = ServeDeploySchema.model_validate(values)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ServeError(f"config {path} cannot be read: {_one_line(error)}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ServeError(f"config {path}: {where}: {_one_line(first['msg'])}") from error
        if not schema.applications:
            raise ServeError(f"config {path} has no applications")
        for entry in schema.applications:
            if entry.import_path != IMPORT_PATH:
                raise ServeError(
                    f"config {path}: application {entry.name!r} has import_path "
                    f"{entry.import_path!r}; this command serves {IMPORT_PATH!r}"
                )
            if not (entry.route_prefix or "/").startswith("/"):
                raise ServeError(
                    f"config {path}: application {entry.name!r} has route_prefix "
                    f"{entry.route_prefix!r}; it must begin with '/'"
                )
        ignored = set(values) - {"applications"}
        for entry, given in zip(schema.applications, values["applications"], strict=True):
            ignored |= {f"{entry.name}.{key}" for key in set(given) - HONOURED}
        applications = (
            Application(entry.name, entry.route_prefix or "/", dict(entry.args))
            for entry in schema.applications
        )
        return cls(tuple(applications), tuple(sorted(ignored)))


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
