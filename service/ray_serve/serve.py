"""``fourstep serve``: everything on this machine, from checks to the last process gone.

checks ─▶ bundles built (progress shown) ─▶ Ray, HAProxy, replicas ─▶ URLs ─▶ signal ─▶ drain
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from engines.backends.choice import Machine
from engines.cli import show_progress
from engines.errors import BuildError, EngineError
from service.access.keys import KeyRing
from service.ray_serve.environment import (
    claim,
    free_port,
    haproxy_available,
    own_ports,
    ray_environment,
)
from service.ray_serve.family import Family
from service.ray_serve.haproxy import HOST, PROBES_AT
from service.ray_serve.machine import ServeError, check_disk, check_memory, check_port, is_loopback
from service.ray_serve.node import start_ray
from service.ray_serve.output import Output, logs_folder
from service.ray_serve.placement import place
from service.ray_serve.serve_config import ServeConfig
from service.ray_serve.stop import stop
from service.settings import Settings, SettingsError

LOOK_EVERY_S = 1.0  # whether Ray is still there
LOOPBACK = "127.0.0.1"
RAISED = re.compile(r"^[A-Za-z_][\w.]*: (?!Traceback)(.+)", re.MULTILINE)  # in a traceback


def serve_here(
    what: ServeConfig | Path,
    *,
    host: str,
    port: int,
    probe_port: int | None = None,
    allow_anonymous: bool = False,
) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code; failures are one line on stderr.

    ``what`` is a Ray Serve config file's path, or what one would say. Other machines are served
    only where every application has API keys, or with ``allow_anonymous``. Probes and scrapes have
    a ``probe_port`` of their own on loopback; None: the one after ``port``, or any that is free.
    """
    with tempfile.TemporaryDirectory(prefix="fourstep-", ignore_cleanup_errors=True) as folder:
        family = Family(folder)
        code = 1
        _set_environment(folder, host)
        try:
            check_port(host, port)
            if probe_port is None:
                probe_port = _port_after(port)
            check_port(LOOPBACK, probe_port, option="--probe-port")
            os.environ[PROBES_AT] = f"{LOOPBACK}:{probe_port}"
            config = ServeConfig.from_file(what) if isinstance(what, Path) else what
            machine = Machine.here()
            config = place(config, machine)
            _check(config, anonymous_to_others=not allow_anonymous and not is_loopback(host))
            code = _run(config, host, port, probe_port, machine.num_gpus, family)
        except (ServeError, EngineError, SettingsError) as error:
            typer.echo(f"error: {error}", err=True)
        except KeyboardInterrupt:
            typer.echo("\nStopped before serving.", err=True)
            code = 130
    if family.lost:  # when Python ends Ray waits ten seconds for who is gone, and crashes
        os._exit(code)
    return code


def _port_after(port: int) -> int:
    with contextlib.suppress(ServeError, OverflowError):
        check_port(LOOPBACK, port + 1)
        if claim(port + 1):
            return port + 1
    return free_port()


def _set_environment(folder: str, host: str) -> None:
    os.environ.update(ray_environment(folder) | own_ports() | {HOST: host})
    os.makedirs(os.environ["FOURSTEP_METRICS_DIR"])
    # Ray keeps a stopping replica for 30 s, for load balancers elsewhere; here there is only ours.
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
    # All of Ray listens on loopback, as it is one machine, and asks whoever calls for a token that
    # only its own processes have: who may call Ray may run any code as this user.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # What Ray does all the time is done on the engine's cores here. It looks ten times a second
    # whether replicas are as they should be, counts itself and, from a line that HAProxy sends it
    # of each, all requests where nobody asks, and has HAProxy run four threads.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("RAY_SERVE_HAPROXY_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_HAPROXY_NBTHREAD", "1")
    # A model that cannot be loaded here cannot be loaded here a second time.
    os.environ["RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT"] = "1"


def _check(config: ServeConfig, *, anonymous_to_others: bool) -> None:
    if config.ignored:
        names = ", ".join(config.ignored)
        typer.echo(f"note: {names}: for a cluster, without effect on this machine", err=True)
    settings = [app.settings for app in config.applications]
    for app, each in zip(config.applications, settings, strict=True):
        if each.api_keys_file:
            KeyRing(each.api_keys_file)
        elif anonymous_to_others:
            raise ServeError(
                f"application {app.name!r} asks for no API key and --host lets other machines in; "
                "give --api-keys FILE (`fourstep key NAME` makes one), or say --allow-anonymous"
            )
    check_memory(sum(app.max_replicas for app in config.applications))
    check_disk(each.cache_dir for each in settings)
    for each in settings:
        _prepare_model(each)


def _prepare_model(settings: Settings) -> None:
    """Fetch it, check it and build a missing bundle here, where progress is seen, not inside a
    replica.
    """
    from engines.backends.choice import choose_backend
    from engines.drawing.calibrating import quantise_parts
    from engines.drawing.model import look, prepare

    backend = choose_backend(settings.engine, device=settings.device).backend
    if backend != "torch" and not settings.serve_meanwhile:
        try:
            prepare(settings.order, show_progress, quantise_parts)
        except BuildError as error:
            if settings.engine != "auto":
                raise
            typer.echo(f"note: {error}; another engine takes over", err=True)
    else:
        look(settings.order)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _run(
    config: ServeConfig, host: str, port: int, probe_port: int, num_gpus: int, family: Family
) -> int:
    if not haproxy_available():
        typer.echo("HAProxy has no wheel for this system: Ray's default proxy serves instead")
    import ray
    from ray import serve

    typer.echo("Starting Ray Serve ...")
    num_replicas = sum(app.max_replicas for app in config.applications)
    serving, output = False, Output()
    drain_s = sum(app.settings.drain_s for app in config.applications)
    try:
        start_ray(max(os.cpu_count() or 1, num_replicas + 1), num_gpus, output)
        _on_signals(_interrupt)  # only now: ray.init puts a handler of its own on SIGTERM
        family.meet(ray.get_runtime_context().gcs_address)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(
            http_options={"host": LOOPBACK if haproxy_available() else host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        targets = [
            serve.RunTarget(app.build(), app.name, app.route_prefix) for app in config.applications
        ]
        serving = True  # a replica may answer before run_many knows of it
        with family.watched():
            serve.run_many(targets)
            _announce(config, host, port, probe_port)
        family.remember()
        while True:
            time.sleep(LOOK_EVERY_S)
            family.check()
    except KeyboardInterrupt:
        if not serving:
            raise
        typer.echo("\nFinishing what runs, then stopping ...")
        return 0
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise ServeError(_cause(error)) from error
    finally:
        output.serving = False
        _on_signals(signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        stop(config if serving else None, family, drain_s)


def _cause(error: Exception) -> str:
    """The replica's own error, which Ray keeps in the status of a deployment, on one line."""
    from ray import serve

    for name, app in serve.status().applications.items():
        for deployment in app.deployments.values():
            raised = RAISED.findall(deployment.message)
            if app.status == "DEPLOY_FAILED" and raised:
                return f"application {name!r} cannot start: {' '.join(raised[-1].split())}"
    return " ".join(str(error).split())


def _announce(config: ServeConfig, host: str, port: int, probe_port: int) -> None:
    for app in config.applications:
        route = app.route_prefix.rstrip("/")
        base = f"http://{host}:{port}{route}"
        probes = f"http://{LOOPBACK}:{probe_port}{route}" if haproxy_available() else base
        typer.echo(
            f"""
Serving {app.args.get("model", app.name)}
  studio   {base}/
  API      {base}/v1/images/generations      (docs: {base}/docs)
  metrics  {probes}/metrics      (and {probes}/readyz, however many connections clients hold)

  curl {base}/v1/images/generations -H 'Content-Type: application/json' -H 'Accept: image/png' \\
       -d '{{"prompt": "a large red star at the center on a yellow background"}}' -o star.png
"""
        )
    typer.echo(f"Ctrl-C stops everything. What Ray and libraries have to say: {logs_folder()}")
    sys.stdout.flush()
