"""`decoders`: images a second through HTTP by each of a model's decoders, and what they are worth.

Both decode for one service in turns, so that they find the same machine. The demo's checker reads
what each drew of the same prompts and seeds; of other models it can say nothing.
"""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from tqdm import tqdm

from engines.distill.captions import caption
from engines.distill.checker import read
from engines.distill.evaluate import Exam
from engines.distill.world import ATTRIBUTES
from engines.facts import DECODERS
from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests.capacity import started_or_named
from loadtests.client import PATH, AllowHostOption, Client, UrlOption, require_answers
from loadtests.report import RESULTS, OutOption, Report
from loadtests.traffic import Profile

TIMEOUT_S = 120.0
NUM_ASKING = 8  # at a time, of the pictures that are read


@dataclasses.dataclass
class Point:
    """One number of steps: images a second by decoder, a value for each round."""

    num_steps: int
    rates: dict[str, list[float]]

    def ratio(self, decoder: str, to: str) -> float:
        pairs = zip(self.rates[decoder], self.rates[to], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def decoders(
    url: UrlOption = "",
    allow_host: AllowHostOption = None,
    model: Annotated[str, typer.Option(help="Of the service started here.")] = "demo-lcm",
    decoder: Annotated[list[str] | None, typer.Option(help="full, tiny. Repeat.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, max=50, help="Repeat.")] = None,
    size_px: Annotated[int, typer.Option(min=64, max=2048, help="Side of the images.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, max=50, help="Alternations.")] = 4,
    count: Annotated[int, typer.Option(min=4, max=5000, help="Images of a round's turn.")] = 256,
    clients: Annotated[int, typer.Option(min=1, max=64, help="In a closed loop.")] = 32,
    num_prompts: Annotated[
        int, typer.Option(min=0, max=2048, help="Pictures for the demo's checker to read.")
    ] = 96,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Images/s at saturation by the full and the tiny decoder, and the checker's accuracy."""
    chosen = tuple(decoder or DECODERS)
    points = [Point(each, {name: [] for name in chosen}) for each in steps or (1, 2, 4)]
    read_right: list[tuple[int, dict[str, float]]] = []
    with started_or_named(url, allow_host, model, cache_dir) as base:
        for index in tqdm(range(rounds), desc="decoders in turns", unit="round"):
            for point in points:
                for name in chosen[:: 1 if index % 2 else -1]:
                    profile = Profile("decoders", (point.num_steps,), (size_px,))
                    point.rates[name].append(_rate(base, profile, name, count, clients, index))
        if num_prompts:
            exam = Exam.of(num_prompts)
            for point in points:
                right = {name: _accuracy(base, exam, name, point.num_steps) for name in chosen}
                read_right.append((point.num_steps, right))
    _write(points, chosen, read_right, size_px, clients, num_prompts).write(out)


def _rate(url: str, profile: Profile, decoder: str, count: int, clients: int, seed: int) -> float:
    """Images a second, without the first of each client, who all came at once, and the last."""
    client = Client(url, body=lambda ask: ask.body() | {"decoder": decoder})
    answers = client.closed_loop(profile.asks(count + 2 * clients, seed), clients)
    require_answers(answers, f"the service, by the decoder {decoder}")
    done_s = sorted(answer.done_s for answer in answers)
    return count / (done_s[count + clients - 1] - done_s[clients - 1])


def _accuracy(url: str, exam: Exam, decoder: str, num_steps: int) -> float:
    """Share of attributes that the checker reads right, from 0 to 1."""

    def right(index: int) -> float:
        scene = exam.scenes[index]
        body = {
            "prompt": caption(scene), "seed": index, "num_inference_steps": num_steps,
            "decoder": decoder,
        }  # fmt: skip
        head = {"content-type": "application/json", "accept": "image/png"}
        asked = urllib.request.Request(url + PATH, json.dumps(body).encode(), head)
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            picture = np.asarray(Image.open(io.BytesIO(answer.read())))
        reading = read(picture)
        return statistics.fmean(reading.agrees(scene, name) for name in ATTRIBUTES)

    with ThreadPoolExecutor(NUM_ASKING) as pool:
        return statistics.fmean(pool.map(right, range(len(exam.scenes))))


def _write(
    points: list[Point], chosen: tuple[str, ...], read_right: list[tuple[int, dict[str, float]]],
    size_px: int, clients: int, num_prompts: int,
) -> Report:  # fmt: skip
    report = Report("decoders", "Images by the full and the tiny decoder, through HTTP")
    report.data["points"] = [dataclasses.asdict(point) for point in points]
    report.data["accuracy"] = dict(read_right)
    first, *others = chosen
    header = ["steps", *(f"{name}, images/s" for name in chosen), *(f"{n}/{first}" for n in others)]
    report.table(
        header,
        [
            [
                point.num_steps,
                *(f"{statistics.median(point.rates[name]):.1f}" for name in chosen),
                *(f"{point.ratio(name, first):.2f}×" for name in others),
            ]
            for point in points
        ],
    )
    report.text(
        f"{size_px} px, {clients} clients in a closed loop; medians of rounds in turns, ratios "
        "within a round."
    )
    if read_right:
        header = ["steps", *(f"{name}, attributes read right, %" for name in chosen)]
        rows = [
            [steps, *(f"{100 * right[name]:.1f}" for name in chosen)] for steps, right in read_right
        ]
        report.table(header, rows)
        report.text(f"The same {num_prompts} prompts and seeds, read by the demo's checker.")
    return report
