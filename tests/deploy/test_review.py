"""A security review by checkov, where it is on the path. Its packages' versions are not ours, so
it lives outside: `pipx install checkov==3.3.30`. What is accepted: deploy/kubernetes/checkov.yaml.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import (
    KUBERNETES,
    OVERLAYS,
    ROOT,
    Object,
    cluster,
    group,
    overlay,
)

CHECKOV = shutil.which("checkov")


def pod(name: str, template: Object) -> Object:
    metadata = template["metadata"] | {"name": name, "namespace": "fourstep"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.mark.skipif(CHECKOV is None, reason="no checkov: pipx install checkov==3.3.30")
def test_checkov_finds_nothing_that_is_not_accepted(kubectl: None, tmp_path: Path) -> None:
    for name in OVERLAYS:
        objects = overlay(name)
        pods = [
            pod("head", cluster(objects)["headGroupSpec"]["template"]),
            pod("replica", group(objects)["template"]),
        ]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(objects + pods))
    shutil.copy(ROOT / "deploy" / "image" / "Dockerfile", tmp_path)
    command = [str(CHECKOV), "--config-file", KUBERNETES / "checkov.yaml", "-d", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
