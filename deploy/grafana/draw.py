"""Draws the dashboard's main panels as a picture, from a Prometheus that has watched a service.

    python deploy/grafana/draw.py --url http://127.0.0.1:9090 --start 1763740000 --end 1763740240

Queries, titles, units and stacking are those of `fourstep.json`; nothing is drawn that Grafana
would not show.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import matplotlib

matplotlib.use("Agg")  # a file, no window

import matplotlib.pyplot as plt
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

HERE = Path(__file__).parent
DASHBOARD = HERE / "fourstep.json"
MAIN = (
    "Requests by status", "Request latency", "Where the time goes, p95",
    "Rows per engine call", "Engine busy", "Rows waiting and running",
    "Time to first preview", "Images", "Refused and lost",
)  # fmt: skip
COLUMNS = 3
NUM_POINTS = 240  # of each line
COLORS = (
    "#2f6db5", "#e08a2e", "#3f9b5f", "#c8443f", "#7d5fb0", "#4fa3b8", "#a0714f", "#8a8f98",
)  # fmt: skip
LABELS = {"reqps": "requests/s", "cps": "calls/s"}
FORMATS = {
    "percentunit": PercentFormatter(1.0, decimals=0),
    "s": FuncFormatter(lambda s, _: f"{s:g} s" if s >= 1 or s == 0 else f"{1000 * s:g} ms"),
}
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "#fbfbfc",
    "axes.edgecolor": "#c9ccd1",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#e6e8eb",
    "text.color": "#24292f",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "font.size": 9.5,
}
Line = tuple[str, np.ndarray, np.ndarray]  # legend, times, values


def load_panels() -> dict[str, dict[str, Any]]:
    """The dashboard's panels by title, rows left out."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {panel["title"]: panel for panel in panels if panel["type"] != "row"}


def expression(target: dict[str, Any], rate_interval: str) -> str:
    """A target's PromQL with Grafana's variables put in: every model."""
    expr: str = target["expr"]
    return expr.replace("$model", ".*").replace("$__rate_interval", rate_interval)


def query_lines(
    http: httpx.Client, panel: dict[str, Any], start: float, end: float, rate_interval: str
) -> list[Line]:
    """What Prometheus answers to a panel's targets, over the time range.

    Raises:
        httpx.HTTPStatusError: Prometheus refuses a query.
    """
    found = []
    for target in panel["targets"]:
        query = {
            "query": expression(target, rate_interval),
            "start": start,
            "end": end,
            "step": (end - start) / NUM_POINTS,
        }
        answer = http.get("/api/v1/query_range", params=query).raise_for_status().json()
        for series in answer["data"]["result"]:
            times, values = np.array(series["values"], dtype=float).T
            found.append((legend(target["legendFormat"], series["metric"]), times, values))
    return found


def legend(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def line_colors(panel: dict[str, Any], names: list[str]) -> list[str]:
    """Those that the panel fixes by name; the others in turn."""
    fixed = {
        override["matcher"]["options"]: override["properties"][0]["value"]["fixedColor"]
        for override in panel["fieldConfig"]["overrides"]
    }
    return [fixed.get(name, COLORS[k % len(COLORS)]) for k, name in enumerate(names)]


def draw_panel(axes: Axes, panel: dict[str, Any], lines: list[Line], start: float) -> None:
    """One panel, as its field settings say."""
    defaults = panel["fieldConfig"]["defaults"]
    colors = line_colors(panel, [name for name, _, _ in lines])
    if defaults["custom"]["stacking"]["mode"] == "normal" and lines:
        times = np.unique(np.concatenate([line[1] for line in lines]))
        stacked = [np.nan_to_num(_at(times, line)) for line in lines]
        names = [name for name, _, _ in lines]
        axes.stackplot((times - start) / 60, stacked, labels=names, colors=colors, alpha=0.85)
    else:
        for color, (name, times, values) in zip(colors, lines, strict=True):
            axes.plot((times - start) / 60, values, label=name, color=color, linewidth=1.7)
    axes.set_title(panel["title"], loc="left", fontweight="bold", fontsize=11, pad=8)
    axes.set_ylabel(LABELS.get(defaults["unit"], ""))
    if defaults["custom"].get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, defaults.get("max"))
    if defaults["unit"] in FORMATS:
        axes.yaxis.set_major_formatter(FORMATS[defaults["unit"]])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: f"{minutes:.0f} min"))
    axes.margins(x=0)
    if lines:
        columns = min(len(lines), 3)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1)}
        axes.legend(**place, ncols=columns, frameon=False, fontsize=8.5, handlelength=1.2)


def _at(times: np.ndarray, line: Line) -> np.ndarray:
    """A line's values at these times, NaN where it has none."""
    _, own, values = line
    known = dict(zip(own.tolist(), values.tolist(), strict=True))
    return np.array([known.get(moment, math.nan) for moment in times.tolist()])


def main(
    url: Annotated[str, typer.Option(help="Of the Prometheus.")] = "http://127.0.0.1:9090",
    start: Annotated[float | None, typer.Option(help="Unix time; default: 5 minutes ago.")] = None,
    end: Annotated[float | None, typer.Option(help="Unix time; default: now.")] = None,
    rate_interval: Annotated[
        str, typer.Option(help="For $__rate_interval; four times the scrape interval.")
    ] = "60s",
    out: Annotated[Path, typer.Option(help="PNG to write.")] = HERE / "dashboard.png",
) -> None:
    """Draw the dashboard's main panels."""
    until = end or time.time()
    since = start or until - 300
    panels = load_panels()
    num_rows = math.ceil(len(MAIN) / COLUMNS)
    with plt.rc_context(STYLE), httpx.Client(base_url=url, timeout=60) as http:
        size = (5.2 * COLUMNS, 3.7 * num_rows)
        figure, grid = plt.subplots(num_rows, COLUMNS, figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for axes, title in zip(grid.flat, MAIN, strict=True):
            lines = query_lines(http, panels[title], since, until, rate_interval)
            draw_panel(axes, panels[title], lines, since)
        figure.savefig(out, dpi=100, facecolor="white", pil_kwargs={"optimize": True})
        plt.close(figure)
    typer.echo(f"{out}: {len(MAIN)} panels, {until - since:.0f} s")


if __name__ == "__main__":
    typer.run(main)
