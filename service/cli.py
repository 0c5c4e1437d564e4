"""``fourstep``: the engine commands, and ``serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.cli import (
    CacheOption,
    GuidanceOption,
    LoraOption,
    SamplerOption,
    StepsOption,
    app,
    parse_loras,
    run,
)
from engines.order import DEFAULT_CACHE_DIR


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="As of `build`.")] = "demo-lcm",
    engine: Annotated[
        str, typer.Option(help="auto, onnxruntime, torch, tensorrt or tensorrt-rtx.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Engines, one each.")] = 1,
    config: Annotated[
        Path | None, typer.Option(help="Ray Serve config (YAML) of several applications.")
    ] = None,
    lora: LoraOption = None,
    steps: StepsOption = 0,
    guidance: GuidanceOption = None,
    sampler: SamplerOption = "",
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
) -> None:
    """Serve a model over HTTP on this machine."""
    from service.serve import serve_here
    from service.serve_config import ServeConfig

    paths, weights = parse_loras(lora)
    args: dict[str, Any] = {
        "loras": {name: str(path) for name, path in paths.items()},
        "default_loras": weights,
        "default_steps": steps or None,
        "default_guidance": guidance,
        "default_sampler": sampler or None,
        "model": model,
        "engine": engine,
        "precision": precision,
        "cache_dir": str(cache_dir),
        "num_replicas": replicas,
    }
    sys.exit(serve_here(config or ServeConfig.of_one(args), host=host, port=port))


def main() -> None:
    """Entry point of the ``fourstep`` command."""
    run(app)


if __name__ == "__main__":
    main()
