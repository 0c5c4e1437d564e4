"""The dashboard: every query runs in a real Prometheus and shows something; it can be drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.monitoring import DEPLOY, Prometheus, names_in

DASHBOARD = json.loads((DEPLOY / "grafana" / "fourstep.json").read_text())
PANELS: list[dict[str, Any]] = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
NEEDS_A_GPU = {"fourstep_gpu_memory_bytes"}


def expressions(panel: dict[str, Any]) -> list[str]:
    filled = (target["expr"].replace("$__rate_interval", "1m") for target in panel["targets"])
    return [expression.replace("$model", ".*") for expression in filled]


def test_panels_have_their_place_and_say_what_they_show() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} covers another panel"
        assert max(x for x, _ in cells) < 24, f"{panel['title']} leaves the grid"
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        assert panel["description"], panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "model"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_shows_something(panel: dict[str, Any], prometheus: Prometheus) -> None:
    known = prometheus.names()
    for expression in expressions(panel):
        names = names_in(expression)
        assert names, f"{expression} reads nothing of ours"
        assert names - NEEDS_A_GPU <= known
        result = prometheus.query(expression)
        assert result or names <= NEEDS_A_GPU, f"{expression} is empty"


def test_it_can_be_drawn(prometheus: Prometheus, tmp_path: Path) -> None:
    picture = tmp_path / "dashboard.png"
    command = [sys.executable, DEPLOY / "grafana" / "draw.py", "--url", prometheus.url]
    done = subprocess.run(
        [*command, "--out", picture, "--rate-interval", "10s"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as image:
        assert image.width > 1000
        assert len(image.convert("L").getcolors() or ()) > 20, "something is drawn"
