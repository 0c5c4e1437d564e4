"""The page of `laptop`: a line for each way, medians over its rounds, ratios within a round."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtests.gpu.models import Counts, Shape, count_shape, with_tiny_decoder
from loadtests.laptop.task import Drawn, Kind
from loadtests.report import Report

REFERENCE = "diffusers:fp32"  # whose picture and times the others' are held against


@dataclass(frozen=True)
class Found:
    """All that was drawn, by a kind's label."""

    drawn: dict[str, tuple[Kind, list[Drawn]]]
    pixels: dict[str, np.ndarray]
    absent: dict[str, tuple[Kind, str]]  # and why


def write_page(found: Found, shape: Shape, num_steps: int, beside: str, out: Path) -> None:
    """JSON and Markdown."""
    report = Report("laptop", f"{shape.name}, random weights, {shape.size_px} px, on a CPU")
    counts = count_shape(shape), count_shape(with_tiny_decoder(shape))
    report.data["drawn"] = {
        label: [dataclasses.asdict(each) for each in drawn]
        for label, (_, drawn) in found.drawn.items()
    }
    report.data["absent"] = {label: why for label, (_, why) in found.absent.items()}
    report.data["gflop"] = {
        "step": counts[0].step / 1e9, "decode": counts[0].decode / 1e9,
        "tiny decode": counts[1].decode / 1e9,
    }  # fmt: skip
    if beside:
        report.text(f"**Beside other work**: {beside}. Ratios are of one round and mean more.")
    _write_images(report, found, num_steps)
    _write_calls(report, found, counts)
    for label, (kind, why) in found.absent.items():
        report.text(f"Absent: {kind.title} ({label}): {why}")
    report.write(out)


def _write_images(report: Report, found: Found, num_steps: int) -> None:
    rows = []
    for label, (kind, drawn) in found.drawn.items():
        long_tiny = _median(num_steps * _step(d) + d.decode_s["tiny"] if d.step_s else math.nan
                            for d in drawn)  # fmt: skip
        short_full = _median(_step(d) + d.decode_s["full"] if d.step_s else math.nan for d in drawn)
        rows.append([
            kind.title, kind.precision, _median(d.image_s for d in drawn), long_tiny, short_full,
            _median(d.quick_s for d in drawn), _ratio(found, label), _psnr(found, label),
            _median(d.load_s for d in drawn), max(d.peak_gb for d in drawn),
        ])  # fmt: skip
    report.table(
        ["drawn by", "precision", f"{num_steps} steps, s", f"{num_steps} steps, tiny decoder, s",
         "1 step, s", "1 step, tiny decoder, s", "of diffusers in fp32", "PSNR to it, dB",
         "load, s", "peak memory, GB"],
        rows,
    )  # fmt: skip
    report.text(
        "Images of one step with the tiny decoder and of all with the full one are waited for; the "
        "two between are the sums of their calls. The ratio is of the former two together, by "
        "round. stable-diffusion.cpp draws its own noise: its picture is another."
    )


def _write_calls(report: Report, found: Found, counts: tuple[Counts, Counts]) -> None:
    full, tiny = counts
    rows = []
    for kind, drawn in found.drawn.values():
        if not drawn[0].step_s:
            continue
        work = {"step": full.step, "full": full.decode, "tiny": tiny.decode}
        seconds = {"step": [_step(d) for d in drawn]}
        seconds |= {name: [d.decode_s[name] for d in drawn] for name in ("full", "tiny")}
        cells: list[object] = [kind.title, kind.precision]
        for name, each in seconds.items():
            shares = [work[name] / s / d.peak_flops_per_s for s, d in zip(each, drawn, strict=True)]
            cells += [statistics.median(each), f"{statistics.median(shares):.0%}"]
        cells.append(f"{_median(d.peak_flops_per_s for d in drawn) / 1e9:.0f}")
        rows.append(cells)
    report.table(
        ["drawn by", "precision", "a step, s", "of the peak", "decode, s", "of the peak",
         "tiny decode, s", "of the peak", "matrix peak, GFLOP/s"],
        rows,
    )  # fmt: skip
    report.text(
        f"A step is {full.step / 1e9:.0f} GFLOP, a decode {full.decode / 1e9:.0f}, a tiny one "
        f"{tiny.decode / 1e9:.0f}. The peak is what `torch.mm` of two large square matrices "
        "reached in the same process and precision."
    )


def _step(drawn: Drawn) -> float:
    return statistics.median(drawn.step_s)


def _median(values: object) -> float:
    return statistics.median(values)  # type: ignore[call-overload,no-any-return]


def _ratio(found: Found, label: str) -> str:
    if REFERENCE not in found.drawn:
        return "–"
    pairs = zip(found.drawn[label][1], found.drawn[REFERENCE][1], strict=False)
    ratios = [(a.image_s + a.quick_s) / (b.image_s + b.quick_s) for a, b in pairs]
    return f"{statistics.median(ratios):.2f}×"


def _psnr(found: Found, label: str) -> str:
    if label.startswith("sd_cpp") or label == REFERENCE or REFERENCE not in found.pixels:
        return "–"
    a, b = (found.pixels[each].astype(np.float64) for each in (label, REFERENCE))
    error = float(np.mean((a - b) ** 2))
    return f"{10 * math.log10(255**2 / error):.1f}" if error else "equal"
