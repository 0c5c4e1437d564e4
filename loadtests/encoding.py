"""`encoding`: what an image costs to encode, by format and effort, in milliseconds and bytes."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from engines.drawing.runner import Runner
from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR, Order
from loadtests.plots import COLORS, name_axes, panels
from loadtests.report import RESULTS, OutOption, Report
from loadtests.traffic import UNIFORM
from service.settings import Settings
from service.web.images import encode_image
from service.web.schema import OutputFormat

NUM_DRAWINGS = 8
PNG_LEVELS = (0, 1, 3, 6, 9)
WEBP_METHODS = (0, 2, 4, 6)
QUALITIES = (80, 90)
COLUMNS = ("drawing_ms", "drawing_bytes", "photo_ms", "photo_bytes")


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to encode: how it is called in the table, and what the encoder is given."""

    name: str
    output_format: OutputFormat
    settings: Settings
    quality: int | None = None


def ways() -> list[Way]:
    plain = Settings()
    found = [
        Way(f"png {level}", "png", plain.model_copy(update={"png_level": level}))
        for level in PNG_LEVELS
    ]
    found += [Way(f"jpeg q{quality}", "jpeg", plain, quality) for quality in QUALITIES]
    found += [
        Way(f"webp {m} q90", "webp", plain.model_copy(update={"webp_method": m}), 90)
        for m in WEBP_METHODS
    ]
    return found


def photograph_like(side: int, seed: int) -> np.ndarray:
    """Uint8 ``[side, side, 3]`` of amplitude 1/f, as natural images have (Field, 1987)."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    f[0, 0] = 1.0
    planes = [
        np.fft.irfft2(np.exp(2j * np.pi * rng.random(f.shape)) / f, s=(side, side))
        for _ in range(3)
    ]
    gray = planes[0]
    pixels = np.stack([0.85 * gray + 0.15 * plane for plane in planes], axis=-1)
    scaled = 128 + 48 * (pixels - pixels.mean()) / pixels.std()
    clipped: np.ndarray = np.clip(scaled, 0, 255).astype(np.uint8)
    return clipped


def drawings(model: str, cache_dir: Path, count: int) -> list[np.ndarray]:
    """What the model draws at its own size."""
    runner = Runner.open(Order(model, "onnxruntime", cache_dir=cache_dir))
    recipes = [
        runner.default_recipe(ask.seed, ask.prompt, ask.num_steps)
        for ask in UNIFORM.asks(count, seed=1)
    ]
    done = [drawing.pixels for drawing in runner.draw(recipes)]
    runner.close()
    return [pixels for pixels in done if pixels is not None]


def encoding(
    model: Annotated[str, typer.Option(help="Whose drawings are encoded.")] = "demo-lcm",
    side: Annotated[
        int, typer.Option(min=64, max=2048, help="Of the photograph-like images, px.")
    ] = 512,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Of each image and way.")] = 15,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Milliseconds and bytes of PNG, JPEG and WebP at each effort; the defaults come from this."""
    drawn = drawings(model, cache_dir, NUM_DRAWINGS)
    photographs = [photograph_like(side, seed) for seed in range(2)]
    found = {
        way.name: (*_measure(way, drawn, repeats), *_measure(way, photographs, repeats))
        for way in ways()
    }
    report = Report("encoding", "Encoding an image: time against bytes")
    report.data["ways"] = {
        name: dict(
            zip(("drawing_ms", "drawing_bytes", "photo_ms", "photo_bytes"), row, strict=True)
        )
        for name, row in found.items()
    }
    plain = Settings()
    defaults = (f"png {plain.png_level}", "jpeg q90", f"webp {plain.webp_method} q90")
    size = f"{drawn[0].shape[1]}×{drawn[0].shape[0]}"
    report.table(
        ["format and effort", f"drawing {size}, ms", "kB", f"photograph-like {side}×{side}, ms",
         "kB", ""],
        [
            [name, f"{a:.2f}", f"{b / 1e3:.1f}", f"{c:.1f}", f"{d / 1e3:.0f}",
             "default" if name in defaults else ""]
            for name, (a, b, c, d) in found.items()
        ],
    )  # fmt: skip
    report.text("`png 1` is the service's own path (Sub filter, Huffman coding); the other levels "
                "are Pillow's. Median of one thread.")  # fmt: skip
    text = "Encoding time against size of each format and effort"
    report.figure("bytes", _plot(found, defaults, size, side), text)
    report.write(out)


def _measure(way: Way, images: list[np.ndarray], repeats: int) -> tuple[float, float]:
    """Median milliseconds and mean bytes."""
    times, sizes = [], []
    for pixels in images:
        for _ in range(repeats):
            begun = time.perf_counter()
            data = encode_image(pixels, way.output_format, way.settings, quality=way.quality)
            times.append(1e3 * (time.perf_counter() - begun))
        sizes.append(len(data))
    return statistics.median(times), statistics.fmean(sizes)


def _plot(
    found: Mapping[str, tuple[float, ...]], defaults: tuple[str, ...], size: str, side: int
) -> Figure:
    figure, axes = panels(2)
    titles = (f"Drawings of {size} px", f"Photograph-like, {side}×{side} px")
    colors = dict(zip(("png", "jpeg", "webp"), COLORS, strict=False))
    for panel, title, column in zip(axes, titles, (0, 2), strict=True):
        for name, row in found.items():
            x, y = row[column], row[column + 1] / 1e3
            color, chosen = colors[name.split()[0]], name in defaults
            panel.plot([x], [y], "o", color=color, markersize=9 if chosen else 5)
            label = f"{name} (default)" if chosen else name.removesuffix(" q90")
            panel.annotate(
                label, (x, y), xytext=(0, 9 if chosen else -15), textcoords="offset points",
                fontsize=8, ha="center", color=color, fontweight="bold" if chosen else None,
            )  # fmt: skip
        panel.set_xscale("log")
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        panel.margins(x=0.12, y=0.15)
        name_axes(panel, title, "ms to encode (log)", "kB (log)")
    return figure
