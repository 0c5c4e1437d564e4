"""What this project promises of a GPU, held against what a run has found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loadtests.gpu.findings import Chapter
from loadtests.gpu.models import SD15, with_tiny_decoder

Row = Mapping[str, Any]
FULL_BATCH = 8  # from which on a GPU should be full


def verdicts(chapters: Mapping[str, Chapter]) -> list[list[object]]:
    """Goal, what was found, whether that is it; goals of which nothing was found are left out."""

    def rows(section: str, table: str) -> Sequence[Row]:
        return chapters[section].tables.get(table, []) if section in chapters else []

    own = [row for row in rows("speed", SD15.name) if row["engine"] == "product"]
    tiny = rows("speed", with_tiny_decoder(SD15).name)
    full = [row for row in own if row["batch"] >= FULL_BATCH]
    start = [row["first_image_s"] for row in rows("service", "start")]
    shares = [row["http_share"] for row in rows("service", "saturation")]
    found = [
        _at_least("images, share of the matrix peak, batch ≥ 8", 0.55, _of(full, "images_share")),
        _at_most("one image, ms", 25, _of(_alone(own), "images_ms")),
        _at_most("one image with the tiny decoder, ms", 15, _of(_alone(tiny), "images_ms")),
        _at_most("the host's work in a step, ms", 0.3, _of(own, "host_ms")),
        _at_least("HTTP at saturation, of the bare engine", 0.95, shares),
        _at_most("start to first image, s", 20, start),
    ]
    return [verdict for each in found for verdict in each]


def _alone(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["batch"] == 1]


def _of(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows]


def _at_least(what: str, bound: float, found: list[float]) -> Iterator[list[object]]:
    """The worst counts."""
    if found:
        yield [what, f"≥ {bound}", min(found), "yes" if min(found) >= bound else "no"]


def _at_most(what: str, bound: float, found: list[float]) -> Iterator[list[object]]:
    if found:
        yield [what, f"≤ {bound}", max(found), "yes" if max(found) <= bound else "no"]
