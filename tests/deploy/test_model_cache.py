"""What fills the cache volume, and what waits for it, really run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.build.bundle import MANIFEST, open_bundle
from engines.build.source import DEMO_MODELS
from engines.drawing.model import prepare
from engines.errors import CheckpointError
from engines.order import Order
from tests.deploy.manifests import KUBERNETES, ROOT, overlay, replica

SCRIPT = KUBERNETES / "components" / "model-cache" / "fill.sh"


@pytest.mark.skipif(sys.platform != "linux", reason="flock is Linux's")
def test_two_jobs_build_once_what_is_damaged_or_absent(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path: Path
) -> None:
    assert os.access(SCRIPT, os.X_OK)
    built = prepare(Order(str(lcm_checkpoint), "onnxruntime", cache_dir=cache_dir), lambda *_: None)
    bundle = shutil.copytree(built.folder, tmp_path / "models" / "tiny")
    graph = next(bundle.glob("denoiser*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1])
    model = {"MODEL": str(lcm_checkpoint), "BUNDLE": str(bundle)}
    model |= {"BUILD_OPTIONS": "--precision fp32", "PYTHONPATH": str(ROOT)}
    model["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [SCRIPT], env=os.environ | model,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    jobs = [start(), start()]
    said = [job.communicate(timeout=1200)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert sorted("exporting denoiser" in each for each in said) == [False, True], said
    assert any("is not what the manifest says" in each for each in said), said
    open_bundle(bundle)


def test_a_pod_waits_for_the_bundle_and_for_nothing_without_one(
    kubectl: None, tmp_path: Path
) -> None:
    waiting = replica(overlay("gke-l4"))["initContainers"][0]
    assert waiting["name"] == "wait-for-model"
    command = [word.replace("sleep 10", "sleep 0.1") for word in waiting["command"]]
    without = subprocess.run(command, env=os.environ | {"BUNDLE": ""}, capture_output=True)
    assert (without.returncode, without.stdout) == (0, b"")

    bundle = tmp_path / "bundle"
    pod = subprocess.Popen(
        command, env=os.environ | {"BUNDLE": str(bundle)}, stdout=subprocess.PIPE
    )
    assert pod.stdout is not None
    assert b"kubectl logs job/fourstep-model" in pod.stdout.readline()
    bundle.mkdir()
    time.sleep(0.3)
    assert pod.poll() is None, "a folder without a manifest is no bundle"
    (bundle / MANIFEST).touch()
    pod.communicate(timeout=30)
    assert pod.returncode == 0


def test_without_a_bundle_the_checkpoint_itself_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `aks-a100` has it; here there is no hub, and that is what it says."""
    (program,) = re.findall(r"exec python -c '([^']+)' \"\$MODEL\"", SCRIPT.read_text())
    monkeypatch.setattr(sys, "argv", ["-c", "nobody/nothing"])
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        exec(program, {})
    for here in ("demo-lcm", str(DEMO_MODELS / "demo-lcm")):  # there is nothing to fetch
        monkeypatch.setattr(sys, "argv", ["-c", here])
        exec(program, {})
