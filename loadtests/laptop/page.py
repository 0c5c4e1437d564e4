"""The page of `laptop`: a line for each way, medians over its rounds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass

import numpy as np

from loadtests.gpu.models import Counts, Shape, count_shape, with_tiny_decoder
from loadtests.laptop.task import Drawn, Kind
from loadtests.report import Report

REFERENCE = "diffusers:fp32"  # whose picture and times the others' are held against
STEPS = (4, 1)  # of the images that the page speaks of
UNITS = {"wall": "s", "cpu": "CPU s"}


@dataclass(frozen=True)
class How:
    """What a run is made of."""

    rounds: int
    num_steps: int  # of the image that is drawn
    num_threads: int
    clock: str


@dataclass(frozen=True)
class Found:
    """All that was drawn, by a kind's label."""

    drawn: dict[str, tuple[Kind, list[Drawn]]]
    pixels: dict[str, np.ndarray]
    absent: dict[str, tuple[Kind, str]]  # and why


def write_page(found: Found, shape: Shape, how: How, beside: str) -> Report:
    """The report, not saved yet."""
    report = Report("laptop", f"{shape.name}, random weights, {shape.size_px} px, on a CPU")
    full, tiny = count_shape(shape), count_shape(with_tiny_decoder(shape))
    report.data |= {"how": dataclasses.asdict(how) | {"shape": shape.name}}
    report.data["drawn"] = {
        label: [dataclasses.asdict(each) for each in drawn]
        for label, (_, drawn) in found.drawn.items()
    }
    report.data["absent"] = {label: why for label, (_, why) in found.absent.items()}
    if beside:
        report.text(f"**Beside other work**: {beside}.")
    if how.clock == "cpu":
        report.text(
            f"Seconds are those that a process had of a core, with {how.num_threads} thread: other "
            "work on the machine stretches those little."
        )
    _write_images(report, found, how)
    _write_calls(report, found, full, tiny, how)
    for label, (kind, why) in found.absent.items():
        report.text(f"Absent: {kind.title} ({label}): {why}")
    return report


def _write_images(report: Report, found: Found, how: How) -> None:
    unit = UNITS[how.clock]
    kinds = {label: kind for label, (kind, _) in found.drawn.items()}
    images = [(num, decoder) for num in STEPS for decoder in ("full", "tiny")]
    rows = []
    for label, kind in kinds.items():
        drawn = found.drawn[label][1]
        rows.append([
            kind.title, kind.precision, *(_image(drawn, *image) for image in images),
            _ratio(found, label), _psnr(found, label), statistics.median(d.load_s for d in drawn),
            statistics.median(d.first_s for d in drawn), max(d.peak_gb for d in drawn),
        ])  # fmt: skip
    report.table(
        ["drawn by", "precision", f"4 steps, {unit}", f"4 steps, tiny decoder, {unit}",
         f"1 step, {unit}", f"1 step, tiny decoder, {unit}", "4 steps, of diffusers in fp32",
         "PSNR to it, dB", f"load, {unit}", f"first image, {unit}", "peak memory, GB"],
        rows,
    )  # fmt: skip
    beside = [
        d.image_s / (d.num_steps * _step(d) + d.decode_s["full"])
        for _, drawn in found.drawn.values()
        for d in drawn
        if d.step_s
    ]
    report.text(
        "The first image is of one step and the tiny decoder; those before it are later ones, "
        f"sums of their calls. A whole one of {how.num_steps} steps took "
        f"{min(beside, default=math.nan):.2f} to {max(beside, default=math.nan):.2f} times its "
        "calls' sum. stable-diffusion.cpp shows no calls and draws noise of its own."
    )


def _write_calls(report: Report, found: Found, full: Counts, tiny: Counts, how: How) -> None:
    unit, rows = UNITS[how.clock], []
    work = {"step": full.step, "full": full.decode, "tiny": tiny.decode}
    for kind, drawn in found.drawn.values():
        timed = [each for each in drawn if each.step_s]
        cells: list[object] = [kind.title, kind.precision]
        for name, flops in work.items() if timed else ():
            seconds = [_step(d) if name == "step" else d.decode_s[name] for d in timed]
            shares = [flops / s / d.peak_flops_per_s for s, d in zip(seconds, timed, strict=True)]
            cells += [statistics.median(seconds), f"{statistics.median(shares):.0%}"]
        if timed:
            peak = statistics.median(each.peak_flops_per_s for each in timed)
            rows.append([*cells, f"{peak / 1e9:.0f}"])
    report.table(
        ["drawn by", "precision", f"a step, {unit}", "of the peak", f"decode, {unit}",
         "of the peak", f"tiny decode, {unit}", "of the peak", "matrix peak, GFLOP/s"],
        rows,
    )  # fmt: skip
    report.text(
        f"A step is {full.step / 1e9:.0f} GFLOP, a decode {full.decode / 1e9:.0f}, a tiny one "
        f"{tiny.decode / 1e9:.0f}. The peak is what `torch.mm` of two large square matrices "
        "reached in the same process, precision and clock (of int8 `torch._int_mm`)."
    )


def _step(drawn: Drawn) -> float:
    return statistics.median(drawn.step_s)


def _image(drawn: list[Drawn], num_steps: int, decoder: str) -> float:
    """Seconds of an image; of one that shows no calls, where it was drawn."""
    found = [
        num_steps * _step(d) + d.decode_s[decoder] if d.step_s
        else d.image_s if (num_steps, decoder) == (d.num_steps, "full")
        else math.nan
        for d in drawn
    ]  # fmt: skip
    return statistics.median(found)


def _ratio(found: Found, label: str) -> str:
    """Of the images of 4 steps, within a round."""
    if REFERENCE not in found.drawn:
        return "–"
    pairs = zip(found.drawn[label][1], found.drawn[REFERENCE][1], strict=False)
    ratios = [_image([a], 4, "full") / _image([b], 4, "full") for a, b in pairs]
    return f"{statistics.median(ratios):.2f}×"


def _psnr(found: Found, label: str) -> str:
    if label.startswith("sd_cpp") or label == REFERENCE or REFERENCE not in found.pixels:
        return "–"
    a, b = (found.pixels[each].astype(np.float64) for each in (label, REFERENCE))
    error = float(np.mean((a - b) ** 2))
    return f"{10 * math.log10(255**2 / error):.1f}" if error else "equal"
