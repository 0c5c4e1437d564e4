"""`decoders`: images a second through HTTP by each decoder, in fp32 and in 8 bits, and their worth.

All draw in turns in one `fourstep serve`, an application for each precision, so that they find the
same machine. The demo's checker reads what each drew of the same prompts and seeds; of other models
it can say nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import statistics
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
from loadtests import serving
from loadtests.client import PATH, AllowHostOption, Client, UrlOption, check_url, require_answers
from loadtests.report import RESULTS, OutOption, Report
from loadtests.traffic import Profile

TIMEOUT_S = 120.0
NUM_ASKING = 8  # at a time, of the pictures that are read
PRECISIONS = ("fp32", "int8")
BEFORE = "before"
START_TIMEOUT_S = 600.0  # with an export and a calibration, on a machine that is in use


@dataclasses.dataclass(frozen=True)
class Way:
    """A decoder of a service; ``precision`` is empty for one that was not started here, the
    ``decoder`` for one that has but its own.
    """

    precision: str
    decoder: str

    @property
    def name(self) -> str:
        return f"{self.precision} {self.decoder}".strip()

    @property
    def fields(self) -> dict[str, str]:
        """What a request says of it."""
        return {"decoder": self.decoder} if self.decoder else {}


@dataclasses.dataclass
class Point:
    """One number of steps: images a second by way, a value for each round."""

    num_steps: int
    rates: dict[str, list[float]]

    def ratio(self, way: str, to: str) -> float:
        pairs = zip(self.rates[way], self.rates[to], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


Right = dict[str, list[float]]  # by way: the share of each picture's attributes that are right


def decoders(
    url: UrlOption = "",
    allow_host: AllowHostOption = None,
    model: Annotated[str, typer.Option(help="Of the service started here.")] = "demo-lcm",
    decoder: Annotated[list[str] | None, typer.Option(help="full, tiny. Repeat.")] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Of the service started here: fp32, int8. Repeat; default: both."),
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, max=50, help="Repeat.")] = None,
    size_px: Annotated[int, typer.Option(min=64, max=2048, help="Side of the images.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, max=50, help="Alternations.")] = 4,
    count: Annotated[int, typer.Option(min=4, max=5000, help="Images of a round's turn.")] = 96,
    clients: Annotated[int, typer.Option(min=1, max=64, help="In a closed loop.")] = 16,
    num_prompts: Annotated[
        int, typer.Option(min=0, max=2048, help="Pictures for the demo's checker to read.")
    ] = 256,
    before: Annotated[
        str, typer.Option(help="URL of an older version's service, which ratios are over then.")
    ] = "",
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Images/s at saturation by decoder and precision, and the checker's accuracy."""
    points = [Point(each, {}) for each in steps or (1, 2, 4)]
    read_right: dict[int, Right] = {}
    with _served(url, allow_host, model, precision or list(PRECISIONS), cache_dir) as bases:
        ways = [Way(kind, each) for kind in bases for each in decoder or DECODERS]
        if before:
            bases = {BEFORE: check_url(before, allow_host or ()), **bases}
            ways = [Way(BEFORE, ""), *ways]
        for index in tqdm(range(rounds), desc="decoders in turns", unit="round"):
            for point in points:
                for way in ways[:: 1 if index % 2 else -1]:
                    profile = Profile("decoders", (point.num_steps,), (size_px,))
                    rate = _rate(bases[way.precision], profile, way, count, clients, index)
                    point.rates.setdefault(way.name, []).append(rate)
        if num_prompts:
            exam = Exam.of(num_prompts)
            read_right = {
                point.num_steps: {
                    way.name: _right(bases[way.precision], exam, way, point.num_steps)
                    for way in ways
                }
                for point in points
            }
    names = [way.name for way in ways]
    _write(points, names, read_right, size_px, clients, num_prompts).write(out)


@contextlib.contextmanager
def _served(
    url: str, hosts: list[str] | None, model: str, precisions: list[str], cache_dir: Path
) -> Iterator[Mapping[str, str]]:
    """Base URLs by precision: of a named service, or of those that run here meanwhile."""
    if url:
        yield {"": check_url(url, hosts or ())}
        return
    common = {"model": model, "engine": "onnxruntime", "cache_dir": str(cache_dir)}
    args = {each: common | {"precision": each} for each in precisions}
    with serving.several(args, START_TIMEOUT_S) as services:
        yield {name: service.url for name, service in services.items()}


def _rate(url: str, profile: Profile, way: Way, count: int, clients: int, seed: int) -> float:
    """Images a second, without the first of each client, who all came at once, and the last."""
    client = Client(url, body=lambda ask: ask.body() | way.fields)
    answers = client.closed_loop(profile.asks(count + 2 * clients, seed), clients)
    require_answers(answers, f"the service, {way.name}")
    done_s = sorted(answer.done_s for answer in answers)
    return count / (done_s[count + clients - 1] - done_s[clients - 1])


def _right(url: str, exam: Exam, way: Way, num_steps: int) -> list[float]:
    """Of each picture the share of attributes that the checker reads right, from 0 to 1."""

    def right(index: int) -> float:
        scene = exam.scenes[index]
        body = {
            "prompt": caption(scene), "seed": index, "num_inference_steps": num_steps, **way.fields
        }  # fmt: skip
        head = {"content-type": "application/json", "accept": "image/png"}
        asked = urllib.request.Request(url + PATH, json.dumps(body).encode(), head)
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
            picture = np.asarray(Image.open(io.BytesIO(answer.read())))
        reading = read(picture)
        return statistics.fmean(reading.agrees(scene, name) for name in ATTRIBUTES)

    with ThreadPoolExecutor(NUM_ASKING) as pool:
        return list(pool.map(right, range(len(exam.scenes))))


def _write(
    points: list[Point], names: list[str], read_right: dict[int, Right], size_px: int,
    clients: int, num_prompts: int,
) -> Report:  # fmt: skip
    report = Report("decoders", "Images by decoder and precision, through HTTP")
    report.data["points"] = [dataclasses.asdict(point) for point in points]
    report.data["accuracy"] = {
        steps: {name: statistics.fmean(shares) for name, shares in right.items()}
        for steps, right in read_right.items()
    }
    first, *others = names
    header = ["steps", *(f"{name}, images/s" for name in names), *(f"{n}/{first}" for n in others)]
    report.table(
        header,
        [
            [
                point.num_steps,
                *(f"{statistics.median(point.rates[name]):.1f}" for name in names),
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
        header = ["steps", f"{first}, attributes read right, %"]
        header += [f"{name}, and points more" for name in others]
        report.table(
            header,
            [
                [steps, _percent(right[first]), *(_beside(right, n, first) for n in others)]
                for steps, right in read_right.items()
            ],
        )
        report.text(
            f"The same {num_prompts} prompts and seeds, read by the demo's checker; differences "
            "with their standard error over the pictures."
        )
    return report


def _percent(shares: list[float]) -> str:
    return f"{100 * statistics.fmean(shares):.1f}"


def _beside(right: Right, name: str, first: str) -> str:
    """`94.2, -1.1 ± 0.4`."""
    more = [100 * (a - b) for a, b in zip(right[name], right[first], strict=True)]
    error = statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else math.nan
    return f"{_percent(right[name])}, {statistics.fmean(more):+.1f} ± {error:.1f}"
