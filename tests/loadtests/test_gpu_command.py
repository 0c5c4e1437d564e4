"""`loadtests gpu` on a CPU: every section over tiny shapes, and what becomes of those that fail."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.gpu import command
from loadtests.gpu.command import PARTS, Part, run_parts
from loadtests.gpu.findings import Chapter, Findings
from loadtests.gpu.models import SD15
from loadtests.gpu.page import write_page
from loadtests.gpu.wheels import (
    NEEDED,
    PRESENT,
    RAY,
    RTX,
    RTX_SOURCES,
    normal,
    pack,
    pinned,
)
from loadtests.report import ROOT

ODD = "tests.loadtests.odd_sections"


def chapters(out: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    return json.loads((out / "gpu.json").read_text())["sections"]  # type: ignore[no-any-return]


def test_every_section_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tiny work, shared cores
    arguments = ["gpu", "--device", "cpu", "--minutes", "60", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    log = (tmp_path / "gpu.log").read_text()[-3000:]
    assert done.exit_code == 0, done.output + log
    found = {name: chapter["tables"] for name, chapter in chapters(tmp_path).items()}
    assert list(found) == [part.name for part in PARTS]
    assert not any("failed" in tables for tables in found.values()), log
    assert [row["precision"] for row in found["machine"]["matrix peak"]] == ["fp32", "fp16", "bf16"]
    (counts,) = found["tests"]["pytest"]
    assert counts["ended"] == "exit code 0"
    assert counts["passed"] + counts["skipped"] > 50
    assert counts["failure"] == counts["error"] == 0
    engines = [row["engine"] for row in found["speed"]["tiny"]]
    assert engines[:2] == ["product", "product"]
    assert engines[-1] == "compiled, channels-last"
    assert all(row["images/s"] > 0 for row in found["speed"]["tiny"])
    assert found["speed"]["SDXL's UNet, one graph"]
    families = found["families"]
    clips, pictures = families["AnimateLCM, tiny"], families["PixArt-δ, tiny"]
    assert [row["lanes"] for row in clips] == [1, 2]
    assert all(row["clips/s"] > 0 for row in clips)
    assert all(row["images/s"] > 0 for row in pictures)
    assert all(row["signal_to_error_db"] > 100 for row in families["a step against fp32"])
    assert {row["encoding"] for row in found["service"]["saturation"]} == {"png", "jpeg", "webp"}
    first, again = found["service"]["start"]
    assert again["start"] == "again"
    assert first["ready_s"] >= first["load_s"] > first["build_s"] == 0
    page = (tmp_path / "gpu.md").read_text()
    assert "no figure here means a GPU" in page
    assert "| tiny | batch | step, ms |" in page


def test_a_section_that_goes_wrong_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LEAST_S", 0.5)
    parts = [Part(name, f"{ODD}:{name}", 1) for name in ("crash", "late", "well")]
    failed = run_parts([Part("hang", f"{ODD}:hang", 0.2), *parts], "cpu", 120, tmp_path)
    assert failed == ["hang", "crash", "late"]
    found = chapters(tmp_path)
    assert found["crash"]["ended"].startswith("ended with exit code -6")
    assert found["crash"]["tables"]["found"] == [{"what": "the last words"}]
    assert found["late"]["ended"] == "done as far as its time went"
    assert found["well"]["ended"] == "finished"
    assert found["well"]["tables"]["failed"][0]["error"].startswith("ZeroDivisionError")
    assert "its limit" in found["hang"]["ended"]
    assert "| all is well | 50% |" in (tmp_path / "gpu.md").read_text()


def test_what_has_finished_is_not_run_again(tmp_path: Path) -> None:
    well, late = (Part(name, f"{ODD}:{name}", 1) for name in ("well", "late"))
    lines = tmp_path / "gpu.jsonl"

    def begun(name: str) -> int:
        return lines.read_text().count(f'"section": "{name}", "begun"')

    run_parts([well, late], "cpu", 60, tmp_path)
    lines.write_text(lines.read_text() + '{"section": "well", "tab')  # the machine went away
    run_parts([well, late], "cpu", 60, tmp_path)
    assert (begun("well"), begun("late")) == (1, 2)
    run_parts([well], "cpu", 60, tmp_path, fresh=True)
    assert begun("well") == 2
    assert len(chapters(tmp_path)["well"]["tables"]["found"]) == 1


def test_findings_of_another_machine_do_not_count(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "gpu.jsonl")
    here, there = {"machine": "here"}, {"machine": "there"}
    findings.begin("speed", here)
    findings.row("speed", "rates", {"rate": float("nan")})
    findings.end("speed", "finished", 1.0)
    assert findings.chapters(here)["speed"].tables == {"rates": [{"rate": "nan"}]}
    assert findings.chapters(there) == {}


def test_the_page_of_a_gpu_says_which_goals_are_reached(tmp_path: Path) -> None:
    rows = [
        {
            "engine": "product",
            "batch": batch,
            "images_share": share,
            "images_ms": ms,
            "host_ms": 0.2,
        }
        for batch, share, ms in ((1, 0.2, 24.0), (8, 0.6, 110.0), (16, 0.5, 250.0))
    ]
    speed = Chapter({SD15.name: rows}, "finished", 100.0)
    page = write_page({"speed": speed}, {"device": "cuda", "machine": "an H100"}, tmp_path)
    assert "batch ≥ 8 | ≥ 0.55 | 0.5 | no |" in page
    assert "| one image, ms | ≤ 25 | 24 | yes |" in page
    assert "HTTP" not in page.split("## ")[0]


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    assert run_parts([PARTS[0]], "cpu", 1, tmp_path) == ["machine"]
    assert chapters(tmp_path)["machine"]["ended"] == "no time left"


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in (
        ([], "--device cpu"),
        (["--device", "cpu", "--section", "sped"], "use machine, tests, speed"),
    ):
        done = CliRunner().invoke(app, ["gpu", *arguments, "--out", str(tmp_path)])
        assert done.exit_code == 2
        assert words in " ".join(done.output.replace("│", " ").split())


def test_the_command_starts_without_what_a_bare_machine_lacks() -> None:
    """Of all that is installed here only what is there or is carried there, and not the project."""
    there = {normal(name) for name in (*PRESENT, *NEEDED)}
    absent = {
        module
        for module, owners in packages_distributions().items()
        if not there & {normal(owner) for owner in owners} and not (ROOT / module).exists()
    }
    assert {"ray", "openai", "av", "locust"} <= absent
    program = f"import sys; sys.modules |= dict.fromkeys({sorted(absent)!r})\n"
    program += "import importlib.metadata as m; real = m.version\n"
    program += "def version(name):\n"
    program += "    if name in ('fourstep', 'ray'): raise m.PackageNotFoundError(name)\n"
    program += "    return real(name)\n"
    program += "m.version = version\n"
    program += "import loadtests.__main__, loadtests.gpu.families, loadtests.gpu.kernels\n"
    program += "import loadtests.gpu.service\n"
    program += "import loadtests.report as r\n"
    program += "print(r.about()['versions']['ray'])\n"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["absent"], done.stderr[-2000:]


def test_all_that_is_carried_is_pinned() -> None:
    assert len(pinned((*NEEDED, *RAY, *RTX, *RTX_SOURCES))) == len(NEEDED) + 10


def test_wheels_are_packed_split_and_put_together(tmp_path: Path) -> None:
    source, out, there = tmp_path / "wheels", tmp_path / "out", tmp_path / "there"
    source.mkdir()
    for name, size in (("large-1-py3-none-any.whl", 9000), ("small-1-py3-none-any.whl", 500)):
        (source / name).write_bytes(hashlib.shake_256(name.encode()).digest(size))
    pack(sorted(source.glob("*.whl")), out, 5000)
    folders = sorted(out.glob("0*"))
    assert len(folders) >= 2
    assert all(sum(f.stat().st_size for f in each.iterdir()) <= 5000 for each in folders)
    # A pip that only says what it was given.
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/bash\nmkdir -p {there}\ncp "${{@: -2}}" {there}\n')
    fake.chmod(0o755)
    subprocess.run(
        ["bash", str(out / "01" / "install.sh"), str(tmp_path / "site")],
        env={"PATH": f"{fake.parent}:/usr/bin:/bin"}, check=True,
    )  # fmt: skip
    for wheel in source.iterdir():
        assert (there / wheel.name).read_bytes() == wheel.read_bytes()
    assert "--minutes 8" in (out / "README.md").read_text()
