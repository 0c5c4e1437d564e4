"""The init container's script, really run: two pods that start together build once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines.build.bundle import open_bundle
from engines.drawing.model import prepare
from engines.order import Order
from tests.deploy.manifests import KUBERNETES, ROOT

SCRIPT = KUBERNETES / "components" / "model-cache" / "build-once.sh"


@pytest.mark.skipif(sys.platform != "linux", reason="flock is Linux's")
def test_two_pods_build_once_what_is_damaged_or_absent(
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

    pods = [start(), start()]
    said = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert sorted("exporting denoiser" in each for each in said) == [False, True], said
    assert sum("is not what the manifest says" in each for each in said) == 1, said
    open_bundle(bundle)
