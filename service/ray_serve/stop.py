"""How `fourstep serve` stops: what has come in is finished, then every process is gone.

Serve and Ray stop by themselves as long as Ray lives. It may not: a signal to a control group ends
Ray's own processes too, and so may want of memory; then Serve would wait for them without end.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import typer

from service.ray_serve.family import Family, RayLost
from service.ray_serve.serve_config import ServeConfig

LOOK_EVERY_S = 0.5  # whether Ray is still there; it takes a moment to go
STOP_WITHIN_S = 45.0  # of all Ray, besides what replicas may take to finish; it takes 4 to 8


def stop(config: ServeConfig | None, family: Family, drain_s: float) -> None:
    """``config``: the applications that serve, if any. They are given ``drain_s`` to finish.

    ``family.lost`` says afterwards whether Ray was gone: this process must then leave by
    ``os._exit``.
    """
    family.remember()
    if not family.lost:
        with _within(drain_s + STOP_WITHIN_S, family), contextlib.suppress(RayLost):
            _stop_ray(config, family)
    if family.lost:
        family.finish(drain_s)
        family.end(by_themselves_s=0)
    else:
        family.end()


def _stop_ray(config: ServeConfig | None, family: Family) -> None:
    """Serve, while Ray is looked at, then Ray.

    Raises:
        RayLost: one of its processes was gone before it was told to go.
    """
    import ray

    if not ray.is_initialized():
        return
    serve_stops = threading.Thread(target=_stop_serve, args=(config,), daemon=True)
    serve_stops.start()
    while serve_stops.is_alive():
        serve_stops.join(LOOK_EVERY_S)
        family.check()
    ray.shutdown()


def _stop_serve(config: ServeConfig | None) -> None:
    """With the applications' replicas first: they drain while the proxy still carries answers."""
    import ray
    from ray import serve

    with contextlib.suppress(RuntimeError, ray.exceptions.RayError):
        for app in config.applications if config is not None else ():
            serve.delete(app.name)
    with contextlib.suppress(RuntimeError, ray.exceptions.RayError):
        serve.shutdown()


@contextlib.contextmanager
def _within(seconds: float, family: Family) -> Iterator[None]:
    """Where it takes longer all is ended, this process too: Ray waits for itself without end."""

    def give_up() -> None:
        typer.echo(f"error: Ray did not stop within {seconds:.0f} s and was ended", err=True)
        family.end(by_themselves_s=0)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
