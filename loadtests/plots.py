"""How plots look: light ground, thin grid, a title that says what is seen, labels on the lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, told apart by colour-blind readers too; ours comes first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 150,
    "axes.facecolor": "white",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "font.size": 10,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "savefig.bbox": "tight",
}


def panels(count: int = 1, *, height: float = 4.0, width: float = 6.4) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    mpl.rcParams.update(STYLE)  # type: ignore[arg-type]  # read again by every later call on the axes
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def name_axes(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def whole_numbers(axes: Axes) -> None:
    """Label the x axis with integers only: rows, replicas."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def lines(
    axes: Axes, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, room: float = 0.16
) -> None:
    """Draw each series and name it at its end, where there is room kept for the name."""
    for color, (name, (x, y)) in zip(COLORS * 3, series.items(), strict=False):
        axes.plot(x, y, marker="o", color=color)
        axes.annotate(
            name, (x[-1], y[-1]), xytext=(7, 0), textcoords="offset points",
            color=color, va="center", fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.margins(x=0.04)
    low, high = axes.get_xlim()
    if axes.get_xscale() == "linear":
        axes.set_xlim(low, high + room * (high - low))
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)


def stacked(
    axes: Axes,
    labels: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    *,
    minimum: float = 0.06,
) -> None:
    """Horizontal bars of named parts; a part is labelled in its bar where it is wide enough."""
    totals = [sum(column) for column in zip(*parts.values(), strict=True)]
    left = [0.0] * len(labels)
    for color, (name, values) in zip(COLORS * 3, parts.items(), strict=False):
        axes.barh(labels, values, left=left, color=color, label=name, height=0.62)
        for index, value in enumerate(values):
            if value > minimum * max(totals):
                centre = left[index] + value / 2
                axes.text(centre, index, f"{value:.1f}", ha="center", va="center", color="white")
        left = [begin + value for begin, value in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
