"""Every command in its smallest form, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer import BadParameter
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.abuse.attacks import KINDS
from loadtests.abuse.page import maltreat, page
from loadtests.abuse.sessions import drop_sessions
from loadtests.gpu.models import TINY
from loadtests.laptop import ways
from loadtests.laptop.command import BY_LABEL, compare, read_page
from loadtests.laptop.page import Found, How
from loadtests.laptop.page import write_page as write_laptop_page
from loadtests.laptop.task import Drawn, Kind, Task
from loadtests.overload import press
from loadtests.peers import BY_NAME, PEERS
from loadtests.peers.command import measure
from loadtests.peers.environment import pins
from loadtests.peers.findings import Findings
from loadtests.peers.measure import Probe, started
from loadtests.peers.page import write_page
from loadtests.serving import ROOT, Service
from loadtests.soak import watch
from loadtests.traffic import UNIFORM
from tests.engines.checkpoints import make_lora
from tests.engines.peers import MIN_PSNR_DB, psnr_db

POINT = {"backend": "double", "precision": "fp16", "size_px": 128, "num_steps": 4, "memory_mib": 1,
         "step_flops": 1, "peak_flops_per_s": 1, "served_batch": 8,
         "served_decode_batch": 4}  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results"


def run(out: Path, *arguments: str) -> dict:  # type: ignore[type-arg]
    """Invoke a command; its JSON, once its page and every picture of the page are there."""
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (page,) = out.glob("*.md")
    text = page.read_text()
    assert "commit" in text
    pictures = [line.rpartition("(")[2].rstrip(")") for line in text.splitlines() if "![" in line]
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    return json.loads(page.with_suffix(".json").read_text())


def model(lcm_checkpoint: Path, cache_dir: Path) -> list[str]:
    return ["--model", str(lcm_checkpoint), "--cache-dir", str(cache_dir)]


def test_capacity(service: Service, out: Path) -> None:
    found = run(out, "capacity", "--url", service.url, "--seconds", "1", "--trials", "2")
    assert len(found["trials"]) == 5
    for trial in found["trials"]:
        assert 1 <= trial["batch_rows"] <= 8
        assert trial["step_ms"] >= 13.2  # what the double sleeps for a row
    assert found["images_per_s"] < 1.05 * found["saturated_images_per_s"]


def test_overhead(service: Service, lcm_checkpoint: Path, cache_dir: Path, out: Path) -> None:
    found = run(
        out, "overhead", "--url", service.url, *model(lcm_checkpoint, cache_dir),
        "--rounds", "1", "--count", "24", "--clients", "2", "--size-px", "64",
    )  # fmt: skip
    alone = found["budgets"]["one client"]
    assert alone["parts"]["engine"] >= 4 * 13.2 + 8  # four calls and a decode of the double
    assert abs(alone["missing"]) < 0.25  # a busy machine; the command itself says above 5 %


def test_decoders(service: Service, out: Path) -> None:
    """By the one that the double's model has; the checker reads its grey as nothing right."""
    found = run(
        out, "decoders", "--url", service.url, "--decoder", "full", "--steps", "1", "--rounds", "1",
        "--count", "8", "--clients", "2", "--size-px", "64", "--num-prompts", "2",
        "--before", service.url,
    )  # fmt: skip
    (point,) = found["points"]
    assert {*point["rates"]} == {*found["accuracy"]["1"]} == {"before", "full"}
    for way, rates in point["rates"].items():
        assert rates[0] > 0
        assert 0 <= found["accuracy"]["1"][way] < 1


@pytest.fixture
def sampled_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is short has samples enough for its quarters."""
    monkeypatch.setattr("loadtests.resources.SAMPLE_EVERY_S", 0.2)


@pytest.mark.usefixtures("sampled_often")
def test_soak(service: Service, out: Path) -> None:
    watch(service, count=250, clients=16, seed=1).write(out)
    found = json.loads((out / "soak.json").read_text())
    assert min(found["mib"]) > 50


@pytest.mark.usefixtures("sampled_often")
def test_soak_under_abuse(service: Service, out: Path) -> None:
    """All kinds for a few seconds: each acts, and ordinary clients and probes get their answers."""
    page(maltreat(service, seconds=3, seed=1), 3).write(out)
    found = json.loads((out / "soak-abuse.json").read_text())
    assert found["outcomes"].keys() == KINDS.keys()
    for name, outcomes in found["outcomes"].items():
        assert sum(outcomes.values()) >= KINDS[name].at_a_time, name
    assert found["beside"]["statuses"].keys() == {"200"}
    assert found["beside"]["failed_probes"] == 0
    assert set(found["left"].values()) == {0}
    assert found["held"].keys() == {"replica", "HAProxy"}


def test_live_sessions_dropped(service: Service, out: Path) -> None:
    drop_sessions(service, 40).write(out)
    found = json.loads((out / "live-drop.json").read_text())
    assert sum(found["outcomes"].values()) == 40
    assert all(outcome.startswith("dropped") for outcome in found["outcomes"])
    assert all(set(left.values()) == {0} for left in found["left"])


def test_live(service: Service, out: Path) -> None:
    """Through the proxy and Ray, as every client comes."""
    found = run(
        out, "live", "--url", service.url, "--seconds", "1", "--sessions", "1,2", "--rounds", "2"
    )
    for count, (sessions, pictures_per_s, *_) in found["alone"].items():
        assert sessions == int(count)
        assert pictures_per_s > 0
    api = found["api"]
    assert api["together"]["error_share"] == 0
    assert api["lost"]["lowest"] <= api["lost"]["median"] <= api["lost"]["highest"]
    assert [index for index, *_ in api["rounds"]] == [1, 2]


@pytest.mark.usefixtures("sampled_often")
def test_overload(service: Service, out: Path) -> None:
    press(service, factor=3, seconds=5, deadline_s=3600).write(out)
    found = json.loads((out / "overload.json").read_text())
    assert set(found["statuses"]) <= {"200", "429"}, "all had time enough"
    assert found["statuses"]["200"] > 50
    assert found["recovery_s"] > 0


def test_engine(lcm_checkpoint: Path, cache_dir: Path, out: Path) -> None:
    found = run(
        out, "engine", *model(lcm_checkpoint, cache_dir), "--kind", "onnxruntime:fp32",
        "--batch", "1", "--batch", "2", "--size", "64", "--steps", "1", "--seconds", "0.05",
    )  # fmt: skip
    one, two = found["points"]
    assert two["step_flops"] == 2 * one["step_flops"] > 0
    assert one["peak_flops_per_s"] > 0


def test_encoding(lcm_checkpoint: Path, cache_dir: Path, out: Path) -> None:
    found = run(
        out, "encoding", *model(lcm_checkpoint, cache_dir), "--repeats", "1", "--side", "128"
    )["ways"]
    assert found["png 0"]["photo_bytes"] > 3 * 128 * 128  # stored, not compressed
    assert found["png 9"]["photo_bytes"] < found["png 0"]["photo_bytes"]
    assert found["jpeg q80"]["photo_bytes"] < found["jpeg q90"]["photo_bytes"]


def test_plan(out: Path, tmp_path: Path) -> None:
    table = tmp_path / "engine.json"
    calls = {1: (16.4, 13.2, 8.0), 8: (65.6, 21.6, 36.0)}  # of `timing.GPU_SHAPED`
    points = [
        POINT | {"batch": b, "images_per_s": rate, "step_ms": step, "decode_ms": decode}
        for b, (rate, step, decode) in calls.items()
    ]
    table.write_text(json.dumps({"points": points}))
    measured = tmp_path / "capacity.json"
    measured.write_text(
        json.dumps({"saturated_images_per_s": 66.1, "images_per_s": 50.0, "p95_ms": 500})
    )
    found = run(
        out, "plan", "--machine", f"gpu={table}@2", "--hours", "0.02", "--measured", str(measured)
    )  # fmt: skip
    assert found["machines"][0]["saturated"] == pytest.approx(66.1, rel=0.01)
    assert "1.00×" in (out / "plan.md").read_text()
    assert len(found["days"]) >= 4


def test_simulate(out: Path) -> None:
    assert len(run(out, "simulate", "--count", "200", "--seeds", "1")["rows"]) == 6


def test_switch(lcm_checkpoint: Path, cache_dir: Path, out: Path, tmp_path: Path) -> None:
    lora = make_lora(lcm_checkpoint, tmp_path / "lora", ["to_q", "to_k"])
    rows = run(
        out, "switch", *model(lcm_checkpoint, cache_dir), "--lora", f"odd={lora}", "--rounds", "1"
    )["rows"]
    assert {(backend, chosen) for backend, chosen, *_ in rows} == {
        (backend, chosen) for backend in ("onnxruntime", "torch") for chosen in ("odd", "none")
    }
    assert all(call_ms > 0 for *_, call_ms in rows)


def test_tiles(out: Path) -> None:
    found = run(out, "tiles", "--side", "96", "--tile", "64", "--num-tiles", "3")
    names, peaks_gb, all_s, longest_s = zip(*found["rows"], strict=True)
    assert names == ("in tiles of 64 px, the first 3", "whole")
    assert all(peak_gb >= 0 for peak_gb in peaks_gb)
    assert all_s[0] > longest_s[0] > 0
    assert all_s[1] == longest_s[1] > 0


def test_laptop(cache_dir: Path, out: Path) -> None:
    """In this process, what the command has a process each for."""
    kinds = [BY_LABEL[label] for label in ("torch_cpu:fp32", "torch_cpu:bf16", "diffusers:fp32")]
    shape = dataclasses.replace(TINY, precision="fp16")

    def run(kind: Kind, task: Task) -> Drawn:
        if kind.precision == "bf16":
            raise RuntimeError("it is not here")
        return Drawn.from_json(ways.measure(Task.from_json(task.to_json())).to_json())

    how = How(1, num_steps=3, num_threads=torch.get_num_threads(), clock="cpu")
    found = Found({}, {}, {})
    assert list(compare(found, kinds, how, shape, cache_dir, run)) == kinds
    write_laptop_page(found, shape, how, "a test run").save(out)
    page = (out / "laptop.md").read_text()
    assert "Absent: Fourstep, torch (torch_cpu:bf16): it is not here" in page
    asked = json.loads((out / "laptop.json").read_text())["how"]
    again, folder = Found({}, {}, {}), cache_dir / f"laptop-{shape.name.replace(' ', '-')}"
    read_page(again, out, asked, {"torch_cpu:bf16"}, folder)
    assert again.drawn == found.drawn, "a run in parts keeps what it has, all but what is anew"
    assert not again.absent
    with pytest.raises(BadParameter, match="give the same options"):
        read_page(again, out, asked | {"rounds": 2}, set(), folder)
    ours, theirs = found.pixels["torch_cpu:fp32"], found.pixels["diffusers:fp32"]
    assert psnr_db(ours, theirs) >= MIN_PSNR_DB
    for _, (drawn,) in found.drawn.values():
        assert len(drawn.step_s) == 3
        assert 0 < sum(drawn.step_s) < drawn.image_s
        assert set(drawn.decode_s) == {"full", "tiny"}


def test_peers(service: Service, lcm_checkpoint: Path, cache_dir: Path, out: Path) -> None:
    """Two rounds of the product and the newcomer's server, as the command measures and writes.

    The others live in an environment of their own, which a test does not install.
    """
    ours, theirs = BY_NAME["fourstep"], BY_NAME["fastapi_diffusers"]
    findings = Findings()
    python = Path(sys.executable)
    with started(theirs, python, str(lcm_checkpoint), cache_dir, []) as probe:
        for index in range(2):
            for peer, each in ((ours, Probe(ours, service)), (theirs, probe)):
                measure(each, peer, [UNIFORM], findings, point_s=0.7, index=index, seed=1)
            if index == 0:
                findings.choose_rates("uniform", [ours, theirs])
    write_page(findings, [ours, theirs], [UNIFORM], how={}, out=out)
    found = json.loads((out / "peers.json").read_text())
    assert {entry["peer"] for entry in found["saturation"]} == {ours.name, theirs.name}
    assert all(len(entry["rounds"]) == 2 for entry in found["saturation"])
    assert {entry["peer"] for entry in found["latency"]} >= {theirs.name}
    assert all(entry["p50_ms"] > 0 for entry in found["latency"])


def test_every_peer_has_its_file_and_its_pin() -> None:
    for peer in PEERS:
        assert (ROOT / "loadtests" / "peers" / f"{peer.name}.py").is_file()
    assert {pin.partition("==")[0] for pin in pins()} == {"litserve", "bentoml"}


def locust(service: Service, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless"]
    command += ["--only-summary", "--host", service.url, "-u", "4", "-r", "4", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "scenario",
    [["mix"], ["stream"], ["edit"], ["burst", "--arrivals", "20"]],
    ids=lambda scenario: scenario[0],
)
def test_locust(service: Service, scenario: list[str]) -> None:
    done = locust(service, "--scenario", *scenario, "--seconds", "2")
    assert done.returncode == 0, done.stderr[-2000:]


def test_locust_fails_on_a_broken_threshold(service: Service) -> None:
    done = locust(service, "--seconds", "3", "--max-p95-ms", "1")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "threshold: p95" in done.stderr


def test_locust_sends_nothing_to_hosts_that_were_not_named(service: Service) -> None:
    done = locust(service, "--host", "http://203.0.113.1", "--seconds", "1")
    assert done.returncode == 2
    assert "named with --allow-host" in done.stderr
    (total, *_) = [
        line for line in (done.stdout + done.stderr).splitlines() if "Aggregated" in line
    ]
    assert total.split()[1] == "0"
