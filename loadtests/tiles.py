"""What a large decode takes of memory, whole and in tiles: the VAE of SD 1.5, random weights, fp32.

Each way runs in a process of its own (`python -m loadtests.tiles SIDE TILE NUM_TILES`), whose
memory is watched and which is ended where it takes more than it may.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Annotated

import psutil
import torch
import typer

from engines.backends.torch_engine import TorchEngine
from engines.drawing.canvas import Canvas
from engines.families.part import Part
from engines.families.tiles import grid_of
from engines.families.vae import VaeDecoder
from loadtests.gpu.models import VAE
from loadtests.report import RESULTS, ROOT, OutOption, Report

SCALE = 8
INTERVAL_S = 0.02


def tiles(
    side: Annotated[int, typer.Option(min=64, help="Pixels a side of the picture.")] = 2048,
    tile: Annotated[int, typer.Option(min=64, help="Of a tile, as --vae-tiling-px.")] = 512,
    num_tiles: Annotated[
        int, typer.Option(min=0, help="Of the tiles the first so many; 0: all.")
    ] = 0,
    max_gb: Annotated[float, typer.Option(min=1, help="What a decode may take at most.")] = 10.0,
    out: OutOption = RESULTS,
) -> None:
    """Peak memory, time and the longest call of a decode, in tiles and whole."""
    report = Report("tiles", f"A decode of {side}×{side} px in tiles and whole")
    rows = [_measure(side, each, num_tiles, max_gb) for each in (tile, 0)]
    report.data["rows"] = rows
    header = ["decoded", "memory above the loaded decoder's, GB", "all calls, s", "longest call, s"]
    report.table(header, rows)
    report.write(out)


def _measure(side: int, tile: int, num_tiles: int, max_gb: float) -> list[object]:
    what = f"in tiles of {tile} px" if tile else "whole"
    if tile and num_tiles:
        what += f", the first {num_tiles}"
    command = [sys.executable, "-m", "loadtests.tiles", *map(str, (side, tile, num_tiles))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None, "a pipe was asked for"
        assert child.stdout.readline(), "it says when it is loaded"
        process = psutil.Process(child.pid)
        loaded = peak = process.memory_info().rss
        while child.poll() is None:
            peak = max(peak, process.memory_info().rss)
            if peak - loaded > 1e9 * max_gb:
                child.kill()
                return [what, f"stopped at {max_gb:g}", "", ""]
            time.sleep(INTERVAL_S)
        all_s, longest_s = map(float, child.stdout.read().split())
    return [what, round((peak - loaded) / 1e9, 2), round(all_s, 1), round(longest_s, 1)]


def decode(side: int, tile: int, num_tiles: int) -> None:
    """One decode, in tiles or, with 0, whole; prints when it begins, then its seconds."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(sample_size=512, **VAE)
    vae.encoder = None
    latents = torch.randn(1, 4, side // SCALE, side // SCALE)
    outputs = ("pixels", "pixel_sums", "image")
    engine = TorchEngine(Part("vae_decoder", VaeDecoder(vae), {}, {}, outputs), "cpu")
    rows, columns = latents.shape[2:]
    grid = grid_of(rows, columns, tile, SCALE)
    print("loaded", flush=True)
    if grid is None:
        seconds = [_timed(engine, latents)[1]]
    else:
        canvas, seconds = Canvas(grid), []
        while not canvas.done and (num_tiles == 0 or canvas.index < num_tiles):
            down, across = grid.box(canvas.index)
            image, took_s = _timed(engine, latents[:, :, down, across])
            blended = canvas.blend(image)
            canvas.put(blended, blended.pixels.numpy())
            seconds.append(took_s)
    print(sum(seconds), max(seconds))


def _timed(engine: TorchEngine, latents: torch.Tensor) -> tuple[torch.Tensor, float]:
    begun = time.perf_counter()
    image = engine.run({"latents": latents})["image"][0]
    return image, time.perf_counter() - begun


if __name__ == "__main__":
    typer.run(decode)
