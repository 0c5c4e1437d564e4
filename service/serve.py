"""``fourstep serve``: everything on this machine, from checks to the last process gone.

checks ─▶ bundles built (progress shown) ─▶ Ray, HAProxy, replicas ─▶ URLs ─▶ signal ─▶ drain
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import typer
import yaml

from engines.cli import show_progress
from engines.errors import EngineError
from service.settings import SettingsError, load_settings

GIB = 1024**3
MIN_MEMORY = 2 * GIB  # all processes with one replica of a tiny model: 1.6 GB (PSS, 2026-11-21)
MIN_DISK = 1 * GIB
EXIT_WAIT_S = 10.0
IMPORT_PATH = "service.deployment:build"


class ServeError(Exception):
    """This machine cannot serve now; the message is the one line the user sees."""


@dataclass(frozen=True, slots=True)
class Application:
    """One model behind one route; ``import_path`` names the function that builds it."""

    name: str
    route_prefix: str
    args: dict[str, Any]
    import_path: str = IMPORT_PATH

    def build(self) -> Any:
        """The Ray Serve application. Imports Ray, so its environment must stand by then."""
        module, _, function = self.import_path.partition(":")
        return getattr(importlib.import_module(module), function)(self.args)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to serve."""

    applications: tuple[Application, ...]

    @classmethod
    def of_one(cls, args: dict[str, Any]) -> Plan:
        return cls((Application("fourstep", "/", args),))

    @classmethod
    def from_config(cls, path: Path) -> Plan:
        """Read a Ray Serve config file, the same that a RayService's ``serveConfigV2`` holds.

        Raises:
            ServeError: not readable, not of Ray's schema, or an application of another kind.
        """
        from pydantic import ValidationError
        from ray.serve.schema import ServeDeploySchema

        try:
            schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise ServeError(f"config {path} cannot be used: {error}") from error
        for entry in schema.applications:
            if entry.import_path != IMPORT_PATH:
                raise ServeError(
                    f"config {path}: application {entry.name!r} has import_path "
                    f"{entry.import_path!r}; this command serves {IMPORT_PATH!r}"
                )
        return cls(
            tuple(
                Application(entry.name, entry.route_prefix or "/", dict(entry.args))
                for entry in schema.applications
            )
        )


def serve_here(plan: Plan, *, host: str, port: int) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code; failures are one line on stderr."""
    try:
        _check_machine(host, port, plan)
        _prepare_models(plan)
    except (ServeError, EngineError, SettingsError) as error:
        typer.echo(f"error: {error}", err=True)
        return 1
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    folder = tempfile.mkdtemp(prefix="fourstep-")
    try:
        return _run(plan, host, port, folder, stop)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_machine(host: str, port: int, plan: Plan) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose one with --port"
            ) from error
    num_replicas = sum(int(app.args.get("num_replicas", 1)) for app in plan.applications)
    needed = MIN_MEMORY * num_replicas
    available = psutil.virtual_memory().available
    if available < needed:
        raise ServeError(
            f"{available / GIB:.1f} GiB of memory are free and {num_replicas} replica(s) need "
            f"{needed / GIB:.1f} GiB or more; stop something, or serve fewer replicas"
        )
    for name in (str(Path.home()), tempfile.gettempdir()):
        free = shutil.disk_usage(name).free
        if free < MIN_DISK:
            raise ServeError(f"{name} has {free / GIB:.1f} GiB free and 1 GiB is needed")


def _prepare_models(plan: Plan) -> None:
    """Build missing bundles here, where progress is seen, not inside a replica."""
    from engines.model import choose_backend, prepare

    for app in plan.applications:
        values = {k: v for k, v in app.args.items() if k not in RESOURCE_ARGS}
        settings = load_settings(values)
        if choose_backend(settings.engine) == "onnxruntime":
            prepare(settings.model, settings.precision, settings.cache_dir, show_progress)


RESOURCE_ARGS = ("num_replicas", "num_gpus", "num_cpus")


def _run(plan: Plan, host: str, port: int, folder: str, stop: threading.Event) -> int:
    from service.deployment import haproxy_available, ray_environment

    os.environ.update(ray_environment(folder))
    os.makedirs(os.environ["FOURSTEP_METRICS_DIR"])
    # Ray keeps a stopping replica for 30 s, for load balancers elsewhere; here there is only ours.
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
    if haproxy_available():
        os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] = str(_free_port())
        os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(_free_port())
    else:
        typer.echo("HAProxy has no wheel for this system: Ray's default proxy serves instead")
    import ray
    from ray import serve

    typer.echo("Starting Ray Serve ...")
    num_replicas = sum(int(app.args.get("num_replicas", 1)) for app in plan.applications)
    try:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, num_replicas + 1),
            include_dashboard=False,
            logging_level="ERROR",
            configure_logging=True,
        )
    except Exception as error:  # Ray raises bare Exception here, when a busy machine starts slowly
        what = str(error).strip().splitlines()[-1]
        typer.echo(f"error: Ray did not start ({what}); is the machine overloaded?", err=True)
        _end(psutil.Process().children(recursive=True))
        return 1
    try:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(
            http_options={"host": host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        targets = [
            serve.RunTarget(app.build(), app.name, app.route_prefix) for app in plan.applications
        ]
        serve.run_many(targets)
        _announce(plan, host, port)
        stop.wait()
        typer.echo("\nFinishing what runs, then stopping ...")
        return 0
    except RuntimeError as error:
        typer.echo(f"error: {str(error).strip().splitlines()[-1]}", err=True)
        return 1
    finally:
        descendants = psutil.Process().children(recursive=True)
        serve.shutdown()
        ray.shutdown()
        _end(descendants)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(processes: list[psutil.Process]) -> None:
    """End what Ray left behind (its HAProxy, above all): only our own descendants, by id."""
    for send in (None, psutil.Process.terminate, psutil.Process.kill):
        alive = [process for process in processes if process.is_running()]
        if send is not None:
            for process in alive:
                try:
                    send(process)
                except psutil.NoSuchProcess:
                    continue
        _, processes = psutil.wait_procs(alive, timeout=EXIT_WAIT_S / 3)


def _announce(plan: Plan, host: str, port: int) -> None:
    for app in plan.applications:
        base = f"http://{host}:{port}{app.route_prefix.rstrip('/')}"
        typer.echo(
            f"""
Serving {app.args.get("model", app.name)}
  studio   {base}/
  API      {base}/v1/images/generations      (docs: {base}/docs)
  metrics  {base}/metrics

  curl {base}/v1/images/generations -H 'Content-Type: application/json' -H 'Accept: image/png' \\
       -d '{{"prompt": "a large red star at the center on a yellow background"}}' -o star.png
"""
        )
    typer.echo("Ctrl-C stops everything.")
    sys.stdout.flush()
