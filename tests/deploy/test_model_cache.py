"""The init container's script, really run: two pods that start together build once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.bundle import open_bundle
from tests.deploy.manifests import KUBERNETES, ROOT

SCRIPT = KUBERNETES / "components" / "model-cache" / "build-once.sh"


@pytest.mark.skipif(sys.platform != "linux", reason="flock is Linux's")
def test_two_pods_build_once_and_a_damaged_bundle_is_built_again(
    lcm_checkpoint: Path, tmp_path: Path
) -> None:
    assert os.access(SCRIPT, os.X_OK)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    bundle = tmp_path / "models" / "tiny"
    model = {
        "MODEL": str(lcm_checkpoint),
        "BUNDLE": str(bundle),
        "BUILD_OPTIONS": "--precision fp32",
    }
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | model

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    pods = [start(), start()]
    said = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert sorted("exporting denoiser" in each for each in said) == [False, True], said
    open_bundle(bundle)
    graph = next(bundle.glob("denoiser*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1])
    again = start()
    (output, _) = again.communicate(timeout=300)
    assert again.returncode == 0
    assert "exporting denoiser" in output
    open_bundle(bundle)
