"""Live drawing: sessions against pictures a second and their latency, alone and beside API load."""

from __future__ import annotations

import asyncio
import io
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from PIL import Image, ImageDraw

from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests import serving
from loadtests.abuse.sessions import drop_sessions
from loadtests.beside import Turn, in_turns, pooled, ratio_of
from loadtests.capacity import started_or_named
from loadtests.client import (
    AllowHostOption,
    Client,
    Latencies,
    UrlOption,
    require_answers,
    summarise,
)
from loadtests.live_simulated import report_simulated
from loadtests.report import RESULTS, OutOption, Report
from loadtests.traffic import UNIFORM
from service.web.live.client import Tally, play

SIDE_PX = 128
NUM_FRAMES = 32
VALUES = {
    "prompt": "a large red circle at the center on a blue background",
    "size": f"{SIDE_PX}x{SIDE_PX}",
    "num_inference_steps": 2,
    "decoder": "full",
    "strength": 0.7,
    "seed": 1,
}
API_SHARE = 0.5  # of what the service can draw, beside the sessions
NUM_CLIENTS = 32  # that fill it, to learn how much that is
NUM_FILLING = 200  # requests of theirs


def strokes() -> list[bytes]:
    """JPEG files of a disc on its way across, as a hand would draw it."""
    frames = []
    for index in range(NUM_FRAMES):
        image = Image.new("RGB", (SIDE_PX, SIDE_PX), "navy")
        left = index * (SIDE_PX - 48) // NUM_FRAMES
        ImageDraw.Draw(image).ellipse((left, 40, left + 48, 88), fill="red")
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        frames.append(buffer.getvalue())
    return frames


def play_together(
    url: str, num_sessions: int, fps: float, seconds: float, values: Mapping[str, Any]
) -> list[Tally]:
    """So many sessions side by side, each at ``fps`` frames a second."""

    async def together() -> list[Tally]:
        one = (
            play(url, strokes(), values=dict(values), fps=fps, seconds=seconds)
            for _ in range(num_sessions)
        )
        return list(await asyncio.gather(*one))

    return asyncio.run(together())


def _row(tallies: list[Tally]) -> list[object]:
    rates = [tally.fps for tally in tallies]
    late = Latencies(each for tally in tallies for each in tally.latencies_s)
    skipped: Counter[str] = sum((tally.skipped for tally in tallies), Counter())
    share = f"{100 * skipped.total() / max(1, sum(tally.num_sent for tally in tallies)):.0f} %"
    return [
        len(tallies), sum(rates), min(rates), max(rates), late.ms(50), late.ms(95), share,
    ]  # fmt: skip


def live(
    url: UrlOption = "",
    allow_host: AllowHostOption = None,
    sessions: Annotated[str, typer.Option(help="How many side by side, with commas.")] = "1,3",
    beside: Annotated[int, typer.Option(min=1, max=1000, help="Sessions beside the API.")] = 1,
    fps: Annotated[float, typer.Option(min=0.1, max=120, help="Frames sent a second.")] = 20.0,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="Of each run.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, max=50, help="The API alone and beside.")] = 3,
    steps: Annotated[int, typer.Option(min=1, max=50, help="Of each frame.")] = 2,
    decoder: Annotated[str, typer.Option(help="Of each frame: full or tiny.")] = "full",
    drop: Annotated[
        int, typer.Option(min=0, max=100_000, help="Instead: open and drop so many, started here.")
    ] = 0,
    gpu_shaped: Annotated[
        bool, typer.Option("--gpu-shaped", help="Start it over an engine that sleeps as a GPU.")
    ] = False,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Instead: the policy alone, in simulated time.")
    ] = False,
    max_batch: Annotated[
        int, typer.Option(min=0, max=63, help="Of the service started here; 0: its own.")
    ] = 0,
    model: Annotated[str, typer.Option(help="Of the service started here.")] = "demo-lcm",
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Sessions against pictures a second and latency; what the API's p95 loses beside them.

    With --drop: what is left of sessions that end without a goodbye.
    """
    if simulated:
        report_simulated().write(out)
        return
    if drop:
        if url:
            raise typer.BadParameter("--drop looks at a service's processes: leave --url out")
        with serving.fourstep(model, cache_dir, gpu_shaped=gpu_shaped) as service:
            drop_sessions(service, drop).write(out)
        return
    counts = [int(text) for text in sessions.split(",")]
    values = VALUES | {"num_inference_steps": steps, "decoder": decoder}
    own = {"FOURSTEP_MAX_BATCH": str(max_batch)}
    started = started_or_named(
        url, allow_host, model, cache_dir, gpu_shaped=gpu_shaped, environment=own
    )
    with started as base:
        play_together(base, 1, fps, 3.0, values)
        alone = {count: play_together(base, count, fps, seconds, values) for count in counts}
        rate, turns = _beside_api(base, beside, fps, seconds, rounds, values)
    report = Report("live" + ("-gpu-shaped" if gpu_shaped else ""), "Live drawing")
    report.data |= {"alone": {count: _row(tallies) for count, tallies in alone.items()}}
    report.text(
        f"Each session sends {fps:g} frames of {SIDE_PX}x{SIDE_PX} px a second, drawn in "
        f"{steps} {'step' if steps == 1 else 'steps'} by the {decoder} decoder; a frame's latency "
        "is from its sending to its picture. What is skipped was superseded by a newer one."
    )
    report.table(
        ["sessions", "pictures/s", "slowest", "quickest", "p50 ms", "p95 ms", "skipped"],
        [_row(tallies) for tallies in alone.values()],
    )
    _write_api(report, rate, turns)
    report.write(out)


def _beside_api(
    base: str, num_sessions: int, fps: float, seconds: float, rounds: int,
    values: Mapping[str, Any],
) -> tuple[float, list[Turn[int, list[Tally]]]]:  # fmt: skip
    """Requests a second, and rounds of the API's answers alone and with sessions beside them."""
    client = Client(base)
    filled = client.closed_loop(UNIFORM.asks(NUM_FILLING, 1), NUM_CLIENTS)
    require_answers(filled, "the service")
    rate = API_SHARE * summarise(filled)["images_per_s"]

    @contextmanager
    def playing() -> Iterator[list[Tally]]:
        tallies: list[Tally] = []
        with ThreadPoolExecutor(1) as other:
            played = other.submit(play_together, base, num_sessions, fps, seconds, values)
            yield tallies
            tallies += played.result()

    return rate, in_turns(client, UNIFORM, rate, seconds, rounds, {num_sessions: playing})


def _write_api(report: Report, rate: float, turns: list[Turn[int, list[Tally]]]) -> None:
    alone = pooled([turn.alone for turn in turns])
    together = pooled([turn.beside for turn in turns])
    lost = ratio_of(turns)
    rates = [sum(tally.fps for tally in turn.outcome) for turn in turns]
    late = Latencies(each for turn in turns for tally in turn.outcome for each in tally.latencies_s)
    rows = [
        [turn.index + 1, summarise(turn.alone)["p95_ms"], summarise(turn.beside)["p95_ms"],
         turn.p95_ratio, pictures_per_s]
        for turn, pictures_per_s in zip(turns, rates, strict=True)
    ]  # fmt: skip
    report.data["api"] = {
        "rate": rate, "alone": alone, "together": together, "lost": lost, "rounds": rows,
    }  # fmt: skip
    report.text(
        f"Beside API requests of 4 steps at {rate:.1f} a second, {100 * API_SHARE:.0f} % of what "
        f"{NUM_CLIENTS} clients got of the service alone; {len(turns)} rounds in turns on the same "
        f"arrivals. **The API's p95 is {lost['median']:.2f}× its own**, median of the rounds, "
        f"{lost['lowest']:.2f} to {lost['highest']:.2f}. All rounds together:"
    )
    report.table(
        ["", "API p50 ms", "API p95 ms", "live pictures/s", "live p95 ms"],
        [
            ["alone", alone["p50_ms"], alone["p95_ms"], "", ""],
            [f"beside {turns[0].other} live", together["p50_ms"], together["p95_ms"],
             statistics.fmean(rates), late.ms(95)],
        ],
    )  # fmt: skip
    report.text("Round by round:")
    report.table(
        ["round", "API p95 alone, ms", "beside", "", "live pictures/s"],
        [[index, alone_ms, beside_ms, f"{ratio:.2f}×", rate_of]
         for index, alone_ms, beside_ms, ratio, rate_of in rows],
    )  # fmt: skip
