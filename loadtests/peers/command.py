"""`peers`: the same model behind Fourstep and behind what its users would otherwise pick.

Round by round, each peer is started alone on the same cores, filled to saturation, and (from the
second round on) asked at the same fixed rates; all meet the same requests at the same times.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from engines.options import CacheOption
from engines.order import DEFAULT_CACHE_DIR
from loadtests.peers import BY_NAME, PEERS, Peer
from loadtests.peers.environment import ensure_python
from loadtests.peers.findings import LOADS, Findings
from loadtests.peers.measure import Probe, interleaved, started
from loadtests.peers.page import write_page
from loadtests.report import RESULTS, OutOption
from loadtests.serving import StartFailed
from loadtests.traffic import MIXED, PROFILES, UNIFORM, Profile

START_S = 22.0  # to start and end a peer, on average, on two cores; for the plan of a run alone


def peers(
    peer: Annotated[
        list[str] | None, typer.Option(help="Which of them; repeat. Default: all.")
    ] = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="uniform, mixed or sizes; repeat.")
    ] = None,
    load: Annotated[
        list[float] | None,
        typer.Option(min=0.1, max=0.95, help="Of each capacity, besides 0.5 and 0.7; repeat."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, max=20, help="Each starts every peer once.")] = 3,
    minutes: Annotated[float, typer.Option(min=0.5, max=240, help="About how long in all.")] = 24,
    gpu_shaped: Annotated[
        bool, typer.Option("--gpu-shaped", help="Over an engine that sleeps as a GPU would draw.")
    ] = False,
    row_level: Annotated[
        bool, typer.Option("--row-level", help="Lend the peers our batches of any step counts.")
    ] = False,
    fast_png: Annotated[
        bool, typer.Option("--fast-png", help="Give the peers our PNG encoder too.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Engines of each peer, sharing the cores evenly.")
    ] = 1,
    model: Annotated[str, typer.Option(help="The model all serve.")] = "demo-lcm",
    seed: Annotated[int, typer.Option(help="Of the requests and their times.")] = 1,
    peers_python: Annotated[
        Path | None, typer.Option(help="Python that has the extra `peers`; default: made once.")
    ] = None,
    cache_dir: CacheOption = DEFAULT_CACHE_DIR,
    out: OutOption = RESULTS,
) -> None:
    """Throughput, latency, CPU and memory of Fourstep and of what users would pick instead."""
    chosen = _chosen(peer, gpu_shaped)
    profiles = _profiles(profile)
    python = peers_python or ensure_python(cache_dir)
    options = ["--workers", str(workers)]
    options += ["--gpu-shaped"] * gpu_shaped
    options += ["--row-level"] * row_level + ["--fast-png"] * fast_png
    loads = sorted({*LOADS, *(load or ())})
    point_s = _point_s(minutes, rounds, len(chosen), len(profiles), len(loads))
    findings = Findings()

    def work(each: Peer, index: int) -> None:
        begun = time.monotonic()
        with _patiently(each, python, model, cache_dir, options) as probe:
            measure(probe, each, profiles, findings, point_s, index, seed)
        spent = time.monotonic() - begun
        typer.echo(f"round {index + 1}/{rounds}: {each.title}, {spent:.0f} s", err=True)

    interleaved(chosen, 1, work)
    for each in profiles:
        findings.choose_rates(each.name, chosen, loads)
    interleaved(chosen, rounds - 1, lambda each, index: work(each, index + 1))
    how = _how(profile, gpu_shaped, row_level, fast_png, workers)
    write_page(findings, chosen, profiles, how=how, out=out)


@contextlib.contextmanager
def _patiently(
    peer: Peer, python: Path, model: str, cache_dir: Path, options: list[str]
) -> Iterator[Probe]:
    """The peer, started a second time where the first came to nothing: a run is long."""
    with contextlib.ExitStack() as stack:
        try:
            probe = stack.enter_context(started(peer, python, model, cache_dir, options))
        except StartFailed as error:
            typer.echo(f"{peer.title} again: {error}", err=True)
            probe = stack.enter_context(started(peer, python, model, cache_dir, options))
        yield probe


def measure(
    probe: Probe, peer: Peer, profiles: list[Profile], findings: Findings,
    point_s: float, index: int, seed: int,
) -> None:  # fmt: skip
    """Saturation of a running peer, and its latency at the rates that are chosen by now."""
    for profile in profiles:
        probe.warm_up(profile)
        found = probe.saturation(profile, point_s, seed + index)
        findings.saturation.setdefault((profile.name, peer.name), []).append(found)
        for number, ((of, load), rate) in enumerate(findings.rates.items()):
            if of == profile.name and findings.keeps_up(of, load, peer.name):
                answers = probe.at_rate(profile, rate, point_s, seed + 100 * index + number)
                findings.answers.setdefault((of, load, peer.name), []).extend(answers)


def _how(
    profiles: list[str] | None, gpu_shaped: bool, row_level: bool, fast_png: bool, workers: int
) -> dict[str, str]:
    """What is not the default, for names and titles: file suffix → words."""
    found = {f"-{name}": f"{name} requests" for name in profiles or ()} | {
        "-gpu-shaped": "an engine that sleeps as a GPU would draw" if gpu_shaped else "",
        "-row-level": "our row-level batches for all" if row_level else "",
        "-fast-png": "our PNG encoder for all" if fast_png else "",
        f"-{workers}-workers": f"{workers} engines each" if workers > 1 else "",
    }
    return {suffix: words for suffix, words in found.items() if words}


def _point_s(
    minutes: float, rounds: int, num_peers: int, num_profiles: int, num_loads: int
) -> float:
    """Seconds of one measurement, so that all of them take about ``minutes``."""
    num_rates = (3 if num_peers > 2 else 2) * num_loads
    num_points = num_peers * num_profiles * (rounds + (rounds - 1) * num_rates)
    left_s = 60 * minutes - rounds * num_peers * START_S
    return max(2.0, left_s / num_points)


def _chosen(names: list[str] | None, gpu_shaped: bool) -> list[Peer]:
    for name in names or ():
        if name not in BY_NAME:
            raise typer.BadParameter(f"--peer is {name!r}; known are {', '.join(BY_NAME)}")
    found = [p for p in PEERS if not names or p.name in names or p is PEERS[0]]
    found = [p for p in found if p.takes_engine or not gpu_shaped]
    if len(found) < 2:
        raise typer.BadParameter("nothing is left to compare with; name another --peer")
    return found


def _profiles(names: list[str] | None) -> list[Profile]:
    for name in names or ():
        if name not in PROFILES:
            raise typer.BadParameter(f"--profile is {name!r}; known are {', '.join(PROFILES)}")
    return [PROFILES[name] for name in names] if names else [UNIFORM, MIXED]
