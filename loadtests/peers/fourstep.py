"""Fourstep itself, as `fourstep serve` serves it; `--gpu-shaped` changes the engine and no more.

Ray is not imported here: it reads what `serve_here` sets when it is.
"""

from __future__ import annotations

import dataclasses
import os
import sys

from loadtests.peers.drawing import Options
from service.ray_serve.serve import serve_here
from service.ray_serve.serve_config import IMPORT_PATH, Application, ServeConfig

MAX_WAITING = 10_000  # nothing is refused: what waits is what is measured


def main(options: Options) -> int:
    """Serve until SIGINT or SIGTERM."""
    args = {"model": options.model, "cache_dir": str(options.cache_dir), "engine": options.engine}
    app = Application("fourstep", "/", args | {"num_replicas": options.workers})
    os.environ.setdefault("FOURSTEP_MAX_WAITING", str(MAX_WAITING))
    if options.num_threads:
        os.environ.setdefault("FOURSTEP_NUM_THREADS", str(options.num_threads))
    path = "loadtests.peers.gpu_shaped:build_gpu_shaped" if options.gpu_shaped else IMPORT_PATH
    app = dataclasses.replace(app, import_path=path)
    return serve_here(
        ServeConfig((app,)), host="127.0.0.1", port=options.port, probe_port=options.probe_port
    )


if __name__ == "__main__":
    sys.exit(main(Options.parse()))
