"""`day`: a day of traffic over thousands of GPUs in several regions; what it takes, what it costs.

Replicas are counted, not simulated one by one (`loadtests.region`): what one does at its load is
the product's scheduler's in simulated time (`loadtests.curve`). The quarter of an hour in which a
zone is lost is also simulated row by row, for one Ray cluster of the region (`loadtests.cell`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure
from tqdm import tqdm

from loadtests.cell import Cell
from loadtests.curve import MOST, LoadCurve
from loadtests.fleet import Autoscaling
from loadtests.plots import COLORS, name_axes, panels
from loadtests.region import Region, Sums, Supply
from loadtests.report import RESULTS, OutOption, Report
from loadtests.sizing import Machine, rows_due
from loadtests.traffic import MIXED, varying
from loadtests.world import Loss, Place, Policy, World, run, total

REGIONS = ("us-east=0.35@-5", "us-west=0.15@-8", "europe=0.3@1", "asia=0.2@8")
DOWNSCALING_FACTOR = 0.3  # of the overlays' serve.yaml
BEFORE_S, AFTER_S = 120.0, 600.0  # of a zone's loss, simulated row by row


def day(
    machine: Annotated[
        str, typer.Option(help="NAME=FILE.json@PRICE_PER_GPU_HOUR, of `engine` or `gpu`.")
    ] = f"h200={RESULTS / 'gpu.json'}@3.5",
    spot_price: Annotated[float, typer.Option(min=0, help="Of a spot GPU, an hour.")] = 1.4,
    gpus: Annotated[int, typer.Option(min=3, help="That may be had, in all regions.")] = 10_000,
    region: Annotated[
        list[str] | None, typer.Option(help="NAME=SHARE@HOURS_BEFORE_UTC; repeat. Default: four.")
    ] = None,
    zones: Annotated[int, typer.Option(min=2, help="Of each region, alike.")] = 3,
    cell: Annotated[int, typer.Option(min=1, help="Replicas of one Ray cluster at most.")] = 100,
    utilisation: Annotated[
        float, typer.Option(min=0.05, max=2, help="Of all GPUs at a region's peak.")
    ] = 0.75,
    target: Annotated[float, typer.Option(min=0.1, help="Requests in hand of a replica.")] = 4,
    node_s: Annotated[float, typer.Option(min=0, help="A node with its image.")] = 240,
    load_s: Annotated[float, typer.Option(min=0, help="A process and its model.")] = 30,
    spot_share: Annotated[float, typer.Option(min=0, max=1)] = 0.6,
    spot_losses: Annotated[
        float, typer.Option(min=0, max=60, help="Of each spot node, an hour.")
    ] = 0.05,
    lose: Annotated[
        str, typer.Option(help="REGION@UTC_HOUR at which it loses a zone.")
    ] = "europe@18.85",
    lost_hours: Annotated[float, typer.Option(min=0, max=24)] = 1,
    far_ms: Annotated[float, typer.Option(min=0, help="To another region and back.")] = 150,
    exact_replicas: Annotated[
        int, typer.Option(min=0, help="Of the cluster that is simulated row by row; 0: none.")
    ] = 12,
    requests: Annotated[int, typer.Option(min=200, help="At each load of the curve.")] = 6000,
    hours: Annotated[float, typer.Option(min=0.1, max=24, help="Of the UTC day.")] = 24,
    out: OutOption = RESULTS,
) -> None:
    """Replicas, queues and money of a day at internet scale, a zone and spot nodes lost."""
    try:
        bought = Machine.parse(machine, MIXED, 0)
        places = tuple(Place.parse(text) for text in region or REGIONS)
        where, _, hour = lose.partition("@")
        loss = Loss(where, 3600 * float(hour), 3600 * lost_hours)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    if abs(sum(place.share for place in places) - 1) > 1e-6:
        raise typer.BadParameter("--region: the shares must add up to 1")
    if loss.region not in [place.name for place in places]:
        raise typer.BadParameter(f"--lose names {loss.region!r}, which is none of the regions")
    curve = LoadCurve.measure(bought.timing, MIXED, bought.saturated(MIXED), requests)
    supply = Supply(gpus, zones, cell, node_s, load_s, spot_losses_per_hour=spot_losses)
    peak = utilisation * gpus * curve.saturated * MOST
    world = World(curve, places, supply, peak, loss, far_ms / 1e3)
    report = Report("day", f"A day of traffic over {gpus:,} GPUs in {len(places)} regions")
    _explain(report, world, bought, spot_price)
    outcomes = {
        policy: run(world, policy, round(3600 * hours))
        for policy in tqdm(_policies(gpus, target, spot_share), desc="days", unit="day")
    }
    _compare(report, outcomes, bought.price_per_hour, spot_price)
    shown = list(outcomes)[-1]
    _by_region(report, world, shown, outcomes[shown])
    if exact_replicas:
        _check(report, world, bought, shown, exact_replicas)
    report.figure("regions", _plot(world, outcomes[shown]), "Replicas and queue through the day")
    report.write(out)


def _policies(gpus: int, target: float, spot_share: float) -> list[Policy]:
    """From all GPUs all day to what a careful operator runs, one thing at a time."""
    scaled = Autoscaling(
        gpus // 20, gpus, target_ongoing_requests=target, upscale_delay_s=10, downscale_delay_s=300
    )
    slowly = dataclasses.replace(scaled, downscaling_factor=DOWNSCALING_FACTOR)
    with_room = dataclasses.replace(slowly, target_ongoing_requests=target / 2)
    return [
        Policy("all GPUs all day", dataclasses.replace(scaled, min_replicas=gpus)),
        Policy(f"target {target:g}", scaled),
        Policy(f"target {target:g}, smaller steps down", slowly),
        Policy(f"target {target / 2:g}, smaller steps down", with_room),
        Policy("… and spot", with_room, spot_share),
        Policy("… and regions help out", with_room, spot_share, spill=True),
    ]


def _explain(report: Report, world: World, machine: Machine, spot_price: float) -> None:
    supply, curve = world.supply, world.curve
    regions = ", ".join(f"{p.name} ({p.share:.0%}, UTC{p.utc_offset_h:+g})" for p in world.places)
    report.text(
        f"Machine: {machine.timing.name}, {curve.saturated:.1f} images/s with every batch full, by "
        f"the product's scheduler over the measured calls; steps of 1, 2, 4 or 8. An hour of a GPU "
        f"costs {machine.price_per_hour:g} on demand and {spot_price:g} as spot: arguments, not "
        "quotes."
    )
    report.text(
        f"Regions, with their share of GPUs and traffic: {regions}; {supply.zones} zones each. "
        f"A region's traffic is a day of its own time with a peak of {world.peak:,.0f} images/s "
        f"times its share. One GPU is one replica; a Ray cluster has {supply.cell} at most. "
        f"A node with its image takes {supply.node_s:g} s, a process and its model "
        f"{supply.load_s:g}; an idle node stays {supply.idle_s:g} s. A spot node is taken away, "
        f"with its notice, {supply.spot_losses_per_hour:g} times an hour. {world.loss.region} "
        f"loses one zone at {world.loss.at_s / 3600:.2f} h UTC for {world.loss.for_s / 3600:g} h, "
        "and the others have no GPU more than their part. What does not fit a replica's "
        f"{supply.max_waiting} images is refused (429) and does not come back. Arrivals are "
        "taken as even within a second: of thousands of images in one the noise is below 2 %."
    )
    rows = [
        [f"{load:.0%}", *(f"{1e3 * np.interp(q, np.arange(0.5, 100), curve.latencies_s(load)):.0f}"
                          for q in (50, 95, 99)), f"{curve.ongoing_at(load):.1f}"]
        for load in (0.25, 0.5, 0.7, 0.8, 0.9, MOST)
    ]  # fmt: skip
    report.text("## One replica")
    report.table(["load", "p50, ms", "p95, ms", "p99, ms", "requests in hand"], rows)


def _compare(
    report: Report, outcomes: dict[Policy, dict[str, Sums]], price: float, spot_price: float
) -> None:
    rows: list[list[object]] = []
    for policy, outcome in outcomes.items():
        sums = total(outcome)
        cost = (sums.node_s[0] * price + sums.node_s[1] * spot_price) / 3600
        asked = sums.served + sums.refused
        rows.append(
            [
                policy.name, f"{sums.mean_replicas:,.0f}", f"{most_at_once(outcome):,}",
                f"{sum(sums.node_s) / 3600:,.0f}", f"{cost:,.0f}",
                f"{1000 * cost / sums.served:.4f}",
                *(f"{1e3 * sums.percentile_s(share):.0f}" for share in (0.5, 0.95, 0.99)),
                f"{sums.longest_wait_s:.1f}", f"{sums.refused / asked:.3%}", f"{sums.cut:,.0f}",
                f"{sums.spot_lost:,}",
            ]
        )  # fmt: skip
    report.text("## The day")
    report.text(
        f"{asked / 1e9:.1f} thousand million images. Autoscaled by requests in hand: of those a "
        "replica has few until it is nearly full, so Ray's rule, which takes them as proportional "
        "to the load, goes down too far and up again; `downscaling_factor` "
        f"{DOWNSCALING_FACTOR:g} takes that part of each step down."
    )
    header = ["way", "replicas, mean", "most", "GPU-hours", "cost", "cost of 1000 images",
              "p50, ms", "p95, ms", "p99, ms", "longest queue, s", "refused", "cut with the zone",
              "spot nodes lost"]  # fmt: skip
    report.table(header, rows)
    report.data["ways"] = [dict(zip(header, row, strict=True)) for row in rows]


def most_at_once(outcome: dict[str, Sums]) -> int:
    """Replicas of all regions in the minute that had the most."""
    minutes = zip(*(sums.history for sums in outcome.values()), strict=True)
    return int(max(sum(each[1] for each in minute) for minute in minutes))


def _by_region(report: Report, world: World, policy: Policy, outcome: dict[str, Sums]) -> None:
    rows = [
        [
            place.name, f"{round(world.supply.gpus * place.share):,}",
            f"{sums.mean_replicas:,.0f}", f"{max(each[1] for each in sums.history):,}",
            f"{1e3 * sums.percentile_s(0.95):.0f}", f"{sums.longest_wait_s:.1f}",
            f"{sums.refused / (sums.served + sums.refused):.3%}", f"{sums.cut:,.0f}",
        ]
        for place, sums in zip(world.places, outcome.values(), strict=True)
    ]  # fmt: skip
    report.text(f"## Its regions: {policy.name}")
    report.table(["region", "GPUs", "replicas, mean", "most", "p95, ms", "longest queue, s",
                  "refused", "cut"], rows)  # fmt: skip


def _check(report: Report, world: World, machine: Machine, policy: Policy, count: int) -> None:
    """The zone's loss for one small cluster, counted and row by row, without spot and help."""
    (place,) = [each for each in world.places if each.name == world.loss.region]
    gpus = round(world.supply.gpus * place.share)
    factor, begin = gpus / count, world.loss.at_s - BEFORE_S
    rate, peak = world.rate(place), world.peak * place.share / factor
    load = world.curve.load_at(policy.config.target_ongoing_requests)
    ready = min(count, math.ceil(rate(begin) / factor / (load * world.curve.saturated)))
    ready = max(ready, world.supply.zones)  # one is left
    supply = dataclasses.replace(world.supply, gpus=count, cell=count)
    cold = dataclasses.replace(
        policy.config, min_replicas=1, max_replicas=count,
        cold_start_s=supply.node_s + supply.load_s,
    )  # fmt: skip

    region = Region(world.curve, cold, supply, ready, seed=0)
    for now in range(round(BEFORE_S + AFTER_S)):
        if now == BEFORE_S:
            region.lose_zone(0)
        region.tick(now, rate(begin + now) / factor)
    cell = Cell(machine.timing, cold, gpus=count, ready=ready, zones=supply.zones,
                max_waiting=supply.max_waiting, lost_at_s=BEFORE_S)  # fmt: skip
    times = varying(lambda time: rate(begin + time) / factor, peak, seed=3)
    outcome = cell.run(rows_due(times, MIXED, BEFORE_S + AFTER_S))
    latencies = np.quantile(outcome.latencies_s, (0.5, 0.95, 0.99))
    counted = region.sums
    rows: list[Sequence[object]] = [
        ["images", f"{counted.served:,.0f}", f"{len(outcome.latencies_s):,}"],
        *(
            [f"p{share * 100:.0f}, ms", f"{1e3 * counted.percentile_s(share):.0f}",
             f"{1e3 * exact:.0f}"]
            for share, exact in zip((0.5, 0.95, 0.99), latencies, strict=True)
        ),
        ["refused", f"{counted.refused:,.0f}", f"{cell.refused:,}"],
        ["cut", f"{counted.cut:,.0f}", f"{cell.cut:,}"],
        ["replicas, mean", f"{counted.mean_replicas:.1f}",
         f"{cell.ready_s / (BEFORE_S + AFTER_S):.1f}"],
    ]  # fmt: skip
    report.text(
        f"## Counted beside simulated row by row: one of {factor:,.0f} parts of {place.name}"
    )
    report.text(
        f"{ready} replicas before the loss, {count} GPUs, {BEFORE_S:g} s before and {AFTER_S:g} s "
        "after it; a proxy for each replica, which sends by the fewest of its own requests."
    )
    report.table(["", "counted", "row by row"], rows)
    report.data["check"] = rows


def _plot(world: World, outcome: dict[str, Sums]) -> Figure:
    figure, (left, right) = panels(2)
    for color, (name, sums) in zip(COLORS, outcome.items(), strict=False):
        times, counts, waits, _ = zip(*sums.history, strict=True)
        hours = [time / 3600 for time in times]
        left.plot(hours, counts, color=color, linewidth=1, label=name)
        right.plot(hours, waits, color=color, linewidth=1, label=name)
    for panel in (left, right):
        panel.axvline(world.loss.at_s / 3600, color="#888888", linestyle="--", linewidth=1)
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
    name_axes(left, "Replicas that are ready", "hours, UTC", "replicas")
    name_axes(right, "Seconds in the queue", "hours, UTC", "seconds")
    return figure
