"""``fourstep``: the engine commands, and ``serve``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.cli import app, run
from engines.options import (
    ArchitectureOption,
    CacheOption,
    DecoderOption,
    DeviceOption,
    EmbeddingOption,
    EngineOption,
    GuidanceOption,
    LoraOption,
    MotionOption,
    PrecisionOption,
    SamplerOption,
    SchedulerOption,
    StepsOption,
    T5Option,
    TilingOption,
    TimestepsOption,
    TinyVaeOption,
    UnetOption,
    VaeOption,
    parse_embeddings,
    parse_loras,
    parse_options,
    parse_timesteps,
)
from engines.order import DEFAULT_CACHE_DIR


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(help="As of `build`.", envvar="FOURSTEP_MODEL")
    ] = "demo-lcm",
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    probe_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="For probes and metrics alone, on loopback. [port + 1]"
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Engines, one each.")] = 1,
    config: Annotated[
        Path | None, typer.Option(help="Ray Serve config (YAML) of several applications.")
    ] = None,
    lora: LoraOption = None,
    unet: UnetOption = "",
    vae: VaeOption = "",
    tiny_vae: TinyVaeOption = "",
    motion_adapter: MotionOption = "",
    t5_int8: T5Option = False,
    vae_tiling_px: TilingOption = 0,
    embedding: EmbeddingOption = None,
    scheduler: SchedulerOption = None,
    architecture: ArchitectureOption = "",
    steps: StepsOption = 0,
    timesteps: TimestepsOption = "",
    guidance: GuidanceOption = None,
    sampler: SamplerOption = "",
    decoder: DecoderOption = "",
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys; `fourstep key NAME` makes its lines.")
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option(help="Serve other machines without API keys.")
    ] = False,
) -> None:
    """Serve a model over HTTP on this machine."""
    from service.ray_serve.serve import serve_here
    from service.ray_serve.serve_config import ServeConfig

    paths, weights = parse_loras(lora)
    args: dict[str, Any] = {
        "loras": paths,
        "default_loras": weights,
        "default_steps": steps or None,
        "default_timesteps": parse_timesteps(timesteps),
        "default_guidance": guidance,
        "default_sampler": sampler or None,
        "default_decoder": decoder or None,
        "model": model,
        "unet": unet or None,
        "vae": vae or None,
        "tiny_vae": tiny_vae or None,
        "motion_adapter": motion_adapter or None,
        "t5_int8": t5_int8 or None,
        "vae_tiling_px": vae_tiling_px or None,
        "embeddings": parse_embeddings(embedding),
        "scheduler": parse_options(scheduler),
        "architecture": architecture or None,
        "engine": engine,
        "precision": precision,
        "device": device,
        "cache_dir": str(cache_dir),
        "num_replicas": replicas,
        "api_keys_file": str(api_keys) if api_keys else None,
    }
    given = {name: value for name, value in args.items() if value not in (None, {})}
    what = config or ServeConfig.of_one(given)  # what is left out may stand in the environment
    sys.exit(
        serve_here(
            what, host=host, port=port, probe_port=probe_port, allow_anonymous=allow_anonymous
        )
    )


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose key it is; for logs.")],
    images_per_minute: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 0,
    max_open_images: Annotated[int, typer.Option(min=0, help="At a time. 0: no limit.")] = 0,
    priority: Annotated[str, typer.Option(help="low, normal or high.")] = "normal",
) -> None:
    """Make an API key: the key itself on stderr, once; its line for the key file on stdout."""
    from service.access.keys import KeyFileError, make_key

    options = {
        "images_per_minute": images_per_minute,
        "max_open_images": max_open_images,
        "priority": priority if priority != "normal" else "",
    }
    try:
        secret, line = make_key(name, {name: str(v) for name, v in options.items() if v})
    except KeyFileError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(f"{secret}   <- give this to {name}; it is kept nowhere", err=True)
    typer.echo(line)


@app.command()
def exporter(
    folder: Annotated[
        Path, typer.Option("--dir", help="FOURSTEP_METRICS_DIR of this node's replicas.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535)] = 9400,
) -> None:
    """Serve the metrics of all replicas of a node, beside them: the sidecar of a pod."""
    from service.telemetry.metrics import export

    if not folder.is_dir():
        raise typer.BadParameter(f"--dir is {folder}; it must be a folder that the replicas share")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))  # by itself PID 1 would ignore SIGTERM
    try:
        export(folder, port)
    except OSError as error:
        raise typer.BadParameter(f"--port is {port}: {error.strerror}; choose another") from None
    while True:
        signal.pause()


@app.command()
def live(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    url: Annotated[str, typer.Option(help="Of the service.")] = "http://127.0.0.1:8000",
    key: Annotated[str, typer.Option(help="API key.", envvar="FOURSTEP_API_KEY")] = "",
    frames: Annotated[
        Path | None, typer.Option(help="Folder of pictures to draw from, sent in turn.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for what is drawn.")] = None,
    fps: Annotated[float, typer.Option(min=0.1, max=120, help="Frames sent a second.")] = 15.0,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600)] = 10.0,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT.")] = "auto",
    steps: Annotated[int, typer.Option(min=1)] = 2,
    strength: Annotated[float, typer.Option(min=0.01, max=1)] = 0.7,
) -> None:
    """Draw live from a folder of frames, as a client of `GET /v1/realtime/images` does."""
    import asyncio
    import statistics

    from websockets.exceptions import WebSocketException

    from service.web.live.client import LiveError, play

    found = [] if frames is None else sorted(each for each in frames.iterdir() if each.is_file())
    if frames is not None and not found:
        raise typer.BadParameter(f"--frames is {frames}; it holds no file")
    values: dict[str, Any] = {"prompt": prompt, "size": size, "num_inference_steps": steps}
    if found:
        values["strength"] = strength
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)

    def keep(picture: Any) -> None:
        if out is not None:
            (out / f"{picture['id']:06}.jpg").write_bytes(picture["image"])

    playing = play(
        url, [each.read_bytes() for each in found] or [None], values=values, fps=fps,
        seconds=seconds, key=key, on_picture=keep,
    )  # fmt: skip
    try:
        tally = asyncio.run(playing)
    except (LiveError, OSError, WebSocketException) as error:
        raise typer.BadParameter(f"--url is {url}: {error}") from None
    late = [1e3 * each for each in sorted(tally.latencies_s)]
    typer.echo(f"{tally.num_sent} frames sent, {len(late)} drawn: {tally.fps:.1f} a second")
    if late:
        p95 = late[int(0.95 * (len(late) - 1))]
        typer.echo(f"from frame to picture: {statistics.median(late):.0f} ms, p95 {p95:.0f} ms")
    for reason, count in tally.skipped.items():
        typer.echo(f"{count} skipped: {reason}")


def main() -> None:
    """Entry point of the ``fourstep`` command."""
    run(app)


if __name__ == "__main__":
    main()
