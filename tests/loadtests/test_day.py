"""A day in counts: nothing is lost uncounted, zones go and come back, rows agree with counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.cell import Cell
from loadtests.curve import MOST, LoadCurve
from loadtests.fleet import Autoscaling, Fleet, fixed
from loadtests.region import Region, Supply
from loadtests.sizing import Machine, rows_at, rows_due
from loadtests.timing import GPU_SHAPED
from loadtests.traffic import MIXED, poisson, until
from loadtests.world import Loss, Place, Policy, World, run, total

SATURATED = Machine("double", GPU_SHAPED, 1.0).saturated(MIXED)
FIXED = Autoscaling(30, 30)


@pytest.fixture(scope="module")
def curve() -> LoadCurve:
    return LoadCurve.measure(GPU_SHAPED, MIXED, SATURATED, count=400)


def test_a_curve_grows_with_the_load_and_is_that_of_the_scheduler(curve: LoadCurve) -> None:
    medians = [float(np.median(curve.latencies_s(load))) for load in (0.1, 0.4, 0.7, MOST)]
    assert medians == sorted(medians)
    assert curve.load_at(curve.ongoing_at(0.6)) == pytest.approx(0.6)
    rows = rows_at(0.5 * SATURATED, MIXED, 400, seed=1)
    alone = Fleet(GPU_SHAPED, fixed(1)).run(rows).latencies_s
    assert np.quantile(alone, 0.95) == pytest.approx(curve.latencies_s(0.5)[95], rel=0.05)


def test_all_that_was_asked_is_served_refused_or_waits(curve: LoadCurve) -> None:
    region = Region(curve, FIXED, Supply(30, cell=30, max_waiting=20), ready=30, seed=0)
    asked = 0.0
    for now in range(120):
        rate = (0.5 if now < 60 else 1.5) * region.capacity()
        asked += rate
        region.tick(now, rate)
    sums = region.sums
    assert sums.refused > 0
    room = 30 * 20
    assert asked - room <= sums.served + sums.refused <= asked
    assert sums.latencies.sum() == pytest.approx(sums.served)
    assert sums.longest_wait_s * region.capacity() <= room


def test_a_lost_zone_takes_a_third_and_comes_back_when_nodes_have_started(curve: LoadCurve) -> None:
    supply = Supply(30, cell=30, node_s=20, load_s=10)
    region = Region(curve, FIXED, supply, ready=30, seed=0)
    counts = []
    for now in range(120):
        if now == 10:
            region.lose_zone(0)
        if now == 60:
            region.find_zone(0)
        region.tick(now, 0.5 * 30 * SATURATED)
        counts.append(region.num_ready)
    assert (counts[9], counts[10], counts[59], counts[89], counts[91]) == (30, 20, 20, 20, 30)
    ongoing = 30 * curve.ongoing_at(0.5)
    assert region.sums.cut == pytest.approx(ongoing / 3, rel=0.05)


def test_spot_nodes_go_are_replaced_and_cost_their_own_price(curve: LoadCurve) -> None:
    supply = Supply(30, cell=30, node_s=5, load_s=1, spot_share=0.6, spot_losses_per_hour=60)
    region = Region(curve, FIXED, supply, ready=30, seed=0)
    for now in range(300):
        region.tick(now, 100)
    assert region.sums.spot_lost > 30
    assert 20 <= region.num_ready <= 30
    demand, spot = region.sums.node_s
    assert spot / (spot + demand) == pytest.approx(0.6, abs=0.05)


def test_counts_scale_as_rows_do(curve: LoadCurve) -> None:
    """One cluster whose load doubles: by `Cell`, row by row, and counted."""
    config = Autoscaling(2, 6, 4.0, upscale_delay_s=5, look_back_period_s=10, cold_start_s=20)
    supply = Supply(6, cell=6, node_s=15, load_s=5)
    region = Region(curve, config, supply, ready=2, seed=0)
    rates = [1.0 * SATURATED] * 60 + [2.0 * SATURATED] * 120
    for now, rate in enumerate(rates):
        region.tick(now, rate)
    cell = Cell(GPU_SHAPED, config, gpus=6, ready=2)
    times = until(poisson(rates[0], 1), 60)
    late = until(poisson(rates[-1], 2), 120)
    cell.run(rows_due(iter([*times, *(60 + time for time in late)]), MIXED, 180))
    assert cell.ready_s / 180 == pytest.approx(region.sums.mean_replicas, rel=0.15)
    assert cell.refused == region.sums.refused == 0


def test_a_lost_zones_rows_are_cut_or_drawn_elsewhere() -> None:
    cell = Cell(GPU_SHAPED, fixed(6), gpus=6, ready=6, lost_at_s=5)
    rows = list(rows_at(3 * SATURATED, MIXED, 1500, seed=1))
    outcome = cell.run(iter(rows))
    assert cell.cut > 0
    assert len(outcome.latencies_s) + cell.cut == len(rows)


def test_regions_help_one_that_lost_a_zone(curve: LoadCurve) -> None:
    places = (Place("east", 0.5, 0), Place("west", 0.5, -12))
    peak = 0.8 * 60 * SATURATED
    world = World(curve, places, Supply(60, cell=30), peak, Loss("east", 600, 600), far_s=0.15)
    config = Autoscaling(60, 60)
    alone, helped = (
        total(run(world, Policy("", config, spill=spill), end_s=1500)) for spill in (False, True)
    )
    assert helped.refused <= alone.refused
    assert helped.served + helped.refused == pytest.approx(alone.served + alone.refused, rel=0.01)


def test_the_command(tmp_path: Path) -> None:
    arguments = ["day", "--out", str(tmp_path), "--gpus", "60", "--hours", "0.1", "--requests",
                 "200", "--exact-replicas", "3", "--lose", "europe@0.02",
                 "--utilisation", "0.3"]  # fmt: skip
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "day.json").read_text())
    costs = [float(way["cost"].replace(",", "")) for way in found["ways"]]
    assert costs[0] > costs[1] > 0, "autoscaling costs less than all GPUs all day"
    page = (tmp_path / "day.md").read_text()
    for words in ("longest queue", "spot nodes lost", "row by row", "arguments, not quotes"):
        assert words in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--machine", "h200"], "NAME=ENGINE.json@PRICE"),
        (["--region", "moon=1"], "NAME=SHARE@HOURS"),
        (["--region", "moon=0.5@0"], "add up to 1"),
        (["--lose", "moon@3"], "none of the regions"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["day", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert words in result.output
