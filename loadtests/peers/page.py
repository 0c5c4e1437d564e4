"""The page of `peers`: a verdict, the tables, the pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.peers import BY_NAME, Peer
from loadtests.peers.findings import OURS, Findings
from loadtests.plots import COLORS, name_axes, panels
from loadtests.report import Report
from loadtests.traffic import Profile

# What issue and README promise: throughput over the best peer's, p95 over its p95 at 70 % of its
# capacity; by whether step counts differ. Where they do not, only overhead can.
PROMISED = {True: (1.3, 0.6), False: (1.05, 0.9)}
AT = "70% of the best peer"


def write_page(
    findings: Findings, peers: Sequence[Peer], profiles: Sequence[Profile],
    *, how: dict[str, str], out: Path,
) -> None:  # fmt: skip
    """Write JSON, Markdown and plots, and show the page; ``how`` is what sets this run apart."""
    title = ", ".join(["Fourstep and its peers", *how.values()])
    report = Report("peers" + "".join(how), title)
    report.data |= findings.to_json()
    report.table(
        [
            "requests",
            "images/s over the best peer's",
            "wanted",
            f"p95 over its p95, at {AT}'s capacity",
            "wanted",
        ],
        [_verdict(findings, profile) for profile in profiles],
    )
    for profile in profiles:
        steps = ", ".join(map(str, profile.steps))
        report.text(f"## Requests of {steps} steps ({profile.name})")
        _saturation(report, findings, profile, peers)
        _latency(report, findings, profile, peers)
    text = "Throughput at saturation of each peer"
    report.figure("throughput", _throughput_plot(findings, peers, profiles), text)
    text = "p50 and p95 of each peer at 70 % of the best peer's capacity"
    report.figure("latency", _latency_plot(findings, peers, profiles), text)
    report.write(out)


def _verdict(findings: Findings, profile: Profile) -> list[str]:
    best = findings.best(profile.name)
    throughput, p95 = PROMISED[len(profile.steps) > 1]
    ratio = findings.capacity(profile.name, OURS.name) / findings.capacity(profile.name, best)
    ours, theirs = (findings.latencies(profile.name, AT, who).ms(95) for who in (OURS.name, best))
    return [
        f"{profile.name} (best peer: {BY_NAME[best].title})",
        f"{ratio:.2f}×", f"≥ {throughput}×", _times(ours / theirs), f"≤ {p95}×",
    ]  # fmt: skip


def _times(ratio: float) -> str:
    return "–" if math.isnan(ratio) else f"{ratio:.2f}×"


def _saturation(
    report: Report, findings: Findings, profile: Profile, peers: Sequence[Peer]
) -> None:
    rows = []
    for peer in peers:
        rounds = findings.saturation[profile.name, peer.name]
        rates = sorted(found.images_per_s for found in rounds)
        rows.append(
            [
                peer.title,
                f"{statistics.median(rates):.2f} ({rates[0]:.2f} to {rates[-1]:.2f})",
                f"{1e3 * statistics.median(found.cpu_s_per_image for found in rounds):.0f}",
                f"{statistics.median(found.memory_mib for found in rounds):.0f}",
            ]
        )
    header = ["at saturation", "images/s, median (range)", "CPU ms an image", "memory, MiB (PSS)"]
    report.table(header, rows)


def _latency(report: Report, findings: Findings, profile: Profile, peers: Sequence[Peer]) -> None:
    rows = []
    for (of, load), rate in findings.rates.items():
        if of != profile.name:
            continue
        cells = [f"{load} ({rate:.1f}/s)"]
        for peer in peers:
            found = findings.latencies(of, load, peer.name)
            first = findings.first_byte(of, load, peer.name)
            percentiles = " / ".join(f"{found.ms(p):.0f}" for p in (50, 95, 99))
            told = f"{percentiles}; {first.ms(50):.0f}"
            cells.append(told if len(found) else "beyond its capacity")
        rows.append(cells)
    header = ["p50 / p95 / p99; p50 to first byte, ms", *(peer.title for peer in peers)]
    report.table(header, rows)


def _throughput_plot(
    findings: Findings, peers: Sequence[Peer], profiles: Sequence[Profile]
) -> Figure:
    figure, axes = panels(len(profiles), height=3.2)
    for panel, profile in zip(axes, profiles, strict=True):
        values = [findings.capacity(profile.name, peer.name) for peer in peers]
        _bars(panel, [peer.title for peer in peers], values, "{:.1f}")
        name_axes(panel, f"{_title(profile)}: throughput", "images/s at saturation", "")
    return figure


def _latency_plot(findings: Findings, peers: Sequence[Peer], profiles: Sequence[Profile]) -> Figure:
    figure, axes = panels(len(profiles), height=3.2)
    for panel, profile in zip(axes, profiles, strict=True):
        found = [(peer, findings.latencies(profile.name, AT, peer.name)) for peer in peers]
        kept = [(peer.title, each) for peer, each in found if len(each)]
        titles = [title for title, _ in kept]
        _bars(panel, titles, [each.ms(95) for _, each in kept], "p95 {:.0f}")
        for index, (_, each) in enumerate(kept):
            panel.plot([each.ms(50)] * 2, [index - 0.31, index + 0.31], color="white")
        rate = findings.rates[profile.name, AT]
        title = f"{_title(profile)}: latency at {rate:.1f} images/s"
        name_axes(panel, title, f"ms, at {AT}'s capacity; white: p50", "")
    return figure


def _bars(panel: Axes, titles: list[str], values: list[float], form: str) -> None:
    colors = [COLORS[0]] + ["#9AA5B1"] * len(titles)
    bars = panel.barh(titles, values, color=colors[: len(titles)], height=0.62)
    panel.bar_label(bars, labels=[form.format(value) for value in values], padding=4)
    panel.invert_yaxis()
    panel.grid(False, axis="y")
    panel.margins(x=0.18)


def _title(profile: Profile) -> str:
    steps = ", ".join(map(str, profile.steps))
    return f"{steps} steps" if len(profile.steps) > 1 else f"Always {steps} steps"
