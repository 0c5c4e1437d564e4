"""The dashboard: every query runs in a real Prometheus and shows something; it can be drawn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.monitoring import DEPLOY, Prometheus, names_in, program
from tests.waiting import wait_for

DASHBOARD, GPUS = (
    json.loads((DEPLOY / "grafana" / name).read_text()) for name in ("fourstep.json", "gpu.json")
)
PANELS: list[dict[str, Any]] = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
# What NVIDIA's DCGM exporter counts unless it is told otherwise (its default-counters.csv).
DCGM = {
    f"DCGM_FI_DEV_{name}"
    for name in ("GPU_UTIL", "FB_USED", "FB_FREE", "XID_ERRORS", "SM_CLOCK", "POWER_USAGE",
                 "GPU_TEMP", "UNCORRECTABLE_REMAPPED_ROWS", "PCIE_REPLAY_COUNTER")
}  # fmt: skip
NEEDS_A_GPU = {"fourstep_gpu_memory_bytes"}


def expressions(panel: dict[str, Any]) -> list[str]:
    filled = (target["expr"].replace("$__rate_interval", "1m") for target in panel["targets"])
    return [expression.replace("$model", ".*") for expression in filled]


@pytest.mark.parametrize("dashboard", [DASHBOARD, GPUS], ids=["fourstep", "gpu"])
def test_panels_have_their_place_and_say_what_they_show(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} covers another panel"
        assert max(x for x, _ in cells) < 24, f"{panel['title']} leaves the grid"
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in (each for each in dashboard["panels"] if each["type"] != "row"):
        assert panel["description"], panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "model" if dashboard is DASHBOARD else "namespace"]


def test_what_is_asked_of_dcgm_is_what_it_counts(tmp_path: Path) -> None:
    """No GPU is here: Prometheus takes every query, whose names are the exporter's or ours."""
    ours = {name for panel in PANELS for each in expressions(panel) for name in names_in(each)}
    rules = []
    for panel in GPUS["panels"]:
        (target,) = panel["targets"]
        expression = target["expr"].replace("$__rate_interval", "1m").replace("$namespace", ".*")
        asked = set(re.findall(r"\bDCGM_\w+", expression)) | names_in(expression)
        assert asked
        assert asked <= DCGM | ours, panel["title"]
        rules.append({"record": f"panel:{panel['id']}", "expr": expression})
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "gpu", "rules": rules}]}))
    done = subprocess.run([program("promtool"), "check", "rules", file], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_shows_something(panel: dict[str, Any], prometheus: Prometheus) -> None:
    known = prometheus.names()
    for expression in expressions(panel):
        names = names_in(expression)
        assert names, f"{expression} reads nothing of ours"
        assert names - NEEDS_A_GPU <= known
        if not names <= NEEDS_A_GPU:
            wait_for(lambda query=expression: bool(prometheus.query(query)), f"{expression} shows")  # type: ignore[misc]


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
