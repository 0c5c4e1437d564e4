"""Pictures and clips on one replica: what the pictures' p95 loses beside clips.

In simulated time, where the figures are the policy's alone, and with `--served` through the real
service over the GPU-shaped double. Clips are 16 frames of a random AnimateDiff made on the spot:
the double draws nothing.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests import serving
from loadtests.beside import in_turns, ratio_of
from loadtests.client import Client, require_answers, summarise
from loadtests.gpu.models import TINY, make_pipeline
from loadtests.report import RESULTS, OutOption, Report
from loadtests.simulate import percentiles
from loadtests.simulated import SimulatedReplica, SimulatedRow
from loadtests.timing import GPU_SHAPED
from loadtests.traffic import Profile

NUM_FRAMES = 16
CLIP_STEPS, PICTURE_STEPS = 6, 4  # AnimateLCM's default, and LCM's
PICTURES = Profile("pictures", (PICTURE_STEPS,), (TINY.size_px,))
LOADS = (0.3, 0.5, 0.7)
OPEN = (1, 2, 8)  # clips that wait or are drawn, at any time
NUM_CLIENTS, NUM_FILLING = 32, 300  # requests that fill the service, to learn what it can draw
PROMISE = 1.5


@dataclass(frozen=True)
class Run:
    """Latencies of pictures in seconds, p50, p95 and p99, and how clips fared beside them."""

    pictures_s: tuple[float, float, float]
    clips_per_s: float = 0.0
    clip_s: float = 0.0  # mean latency


def simulated(rate: float, num_pictures: int, num_open: int, seed: int) -> Run:
    """Poisson arrivals of pictures to the last one, and ``num_open`` clips open at any time."""
    rng, at = random.Random(seed), 0.0
    pictures = []
    for _ in range(num_pictures):
        at += rng.expovariate(rate)
        pictures.append(SimulatedRow(at, PICTURE_STEPS, 128))

    def clip(at: float = 0.0) -> SimulatedRow:
        return SimulatedRow(at, CLIP_STEPS, 128, NUM_FRAMES)

    done = SimulatedReplica(GPU_SHAPED).run(
        pictures, [clip() for _ in range(num_open)], lambda before: clip(before.finished_at)
    )
    mean_s = statistics.fmean(row.latency_s for row in done) if done else float("nan")
    seconds = max(row.finished_at for row in pictures)
    return Run(percentiles(pictures), len(done) / seconds, mean_s)


def clips(
    count: Annotated[int, typer.Option(min=100, help="Pictures of a simulated run.")] = 6000,
    served: Annotated[
        bool, typer.Option("--served", help="Through the real service over the double, too.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=2, max=600, help="Of each run served.")] = 15.0,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Served, alone and beside.")] = 3,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """The p95 of pictures beside clips on one replica, over theirs alone at the same load."""
    report = Report("clips", "Pictures beside clips on one replica")
    report.text(
        f"Pictures of {PICTURE_STEPS} steps arrive at random; clips of {NUM_FRAMES} frames and "
        f"{CLIP_STEPS} steps are always open. Ratios are over the same arrivals without clips; "
        f"{PROMISE} is what we had set ourselves for p95. The double: {GPU_SHAPED.name}, a clip's "
        "step as many rows as it has frames, four frames a decode."
    )
    rows = []
    for load in LOADS:
        rate = load * GPU_SHAPED.images_per_s(PICTURE_STEPS)
        alone = simulated(rate, count, 0, seed=1)
        for num_open in OPEN:
            beside = simulated(rate, count, num_open, seed=1)
            ratios = [b / a for a, b in zip(alone.pictures_s, beside.pictures_s, strict=True)]
            report.data.setdefault("simulated", []).append([load, num_open, *ratios])
            cells: list[object] = [f"{ratio:.2f}×" for ratio in ratios]
            rows.append(
                [f"{load:.0%}", num_open, 1e3 * alone.pictures_s[1], *cells,
                 beside.clips_per_s, beside.clip_s]
            )  # fmt: skip
    report.text("In simulated time, the product's own scheduler:")
    report.table(
        ["load of pictures", "clips open", "p95 alone, ms", "p50", "p95", "p99", "clips/s",
         "a clip takes, s"], rows,
    )  # fmt: skip
    if served:
        with tempfile.TemporaryDirectory() as folder:
            model = make_checkpoint(Path(folder) / "random-clips")
            with serving.fourstep(
                str(model), cache_dir, gpu_shaped=True, engine="torch"
            ) as service:
                _serve(report, service.url, seconds, rounds)
    report.write(out)


def _serve(report: Report, url: str, seconds: float, rounds: int) -> None:
    client = Client(url)
    filled = client.closed_loop(PICTURES.asks(NUM_FILLING, 1), NUM_CLIENTS)
    require_answers(filled, "the service")
    rate = LOADS[1] * summarise(filled)["images_per_s"]
    rows: list[list[object]] = []
    found: list[dict[str, Any]] = []
    others = {num_open: partial(drawing_clips, url, num_open) for num_open in OPEN[:2]}
    turns = in_turns(client, PICTURES, rate, seconds, rounds, others)
    for turn in turns:
        alone, beside, num_drawn = summarise(turn.alone), summarise(turn.beside), len(turn.outcome)
        found.append(
            {"open": turn.other, "alone": alone, "beside": beside, "p95_ratio": turn.p95_ratio,
             "clips": num_drawn}
        )  # fmt: skip
        rows.append(
            [turn.index + 1, turn.other, alone["p50_ms"], alone["p95_ms"], beside["p50_ms"],
             beside["p95_ms"], f"{turn.p95_ratio:.2f}×", num_drawn / seconds,
             beside["error_share"]]
        )  # fmt: skip
    median = ratio_of(turns)["median"]
    report.data["served"] = {"rate": rate, "median_p95_ratio": median, "runs": found}
    report.text(
        f"Through the service, {rate:.1f} pictures a second ({LOADS[1]:.0%} of what "
        f"{NUM_CLIENTS} clients got of it); p95 {median:.2f}×, median of the runs:"
    )
    report.table(
        ["round", "clips open", "p50 alone, ms", "p95 alone", "p50 beside", "p95 beside", "p95",
         "clips/s", "errors"], rows,
    )  # fmt: skip


@contextmanager
def drawing_clips(url: str, num_open: int) -> Iterator[Sequence[float]]:
    """So many clips open at any time until the end; the latencies of those that were drawn."""
    drawn: list[float] = []
    stop = threading.Event()

    async def one(session: aiohttp.ClientSession, index: int) -> None:
        while not stop.is_set():
            body = {"prompt": f"a star {index}", "num_frames": NUM_FRAMES}
            body |= {"num_inference_steps": CLIP_STEPS, "guidance_scale": 1.0}
            begun = time.perf_counter()
            async with session.post(f"{url}/v1/videos", json=body) as answer:
                await answer.read()
                answer.raise_for_status()
            drawn.append(time.perf_counter() - begun)

    async def all_of_them() -> None:
        async with aiohttp.ClientSession(headers={"accept": "video/mp4"}) as session:
            await asyncio.gather(*(one(session, index) for index in range(num_open)))

    thread = threading.Thread(target=asyncio.run, args=(all_of_them(),))
    thread.start()
    try:
        yield drawn
    finally:
        stop.set()
        thread.join()


def make_checkpoint(folder: Path) -> Path:
    """A tiny random AnimateDiff in diffusers' format."""
    import torch
    from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel

    parts = make_pipeline(TINY, "cpu")
    torch.manual_seed(0)
    config = {**parts.unet.config, "time_cond_proj_dim": None}
    adapter = MotionAdapter(
        block_out_channels=tuple(parts.unet.config.block_out_channels),
        motion_layers_per_block=1, motion_norm_num_groups=8, motion_max_seq_length=NUM_FRAMES,
    )  # fmt: skip
    AnimateDiffPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer,
        unet=UNet2DConditionModel.from_config(config), motion_adapter=adapter,
        scheduler=parts.scheduler,
    ).save_pretrained(folder)  # fmt: skip
    return folder
