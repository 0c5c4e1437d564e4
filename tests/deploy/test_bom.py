"""An image's bill of materials: by CycloneDX's own reading, of what lies in its file system."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from cyclonedx.model.bom import Bom

from tests.deploy.manifests import ROOT

DEBIAN = """Package: tini
Status: install ok installed
Architecture: amd64
Version: 0.19.0-1
Description: tiny but valid init for containers
 which reaps

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""


def bill(root: Path, out: Path) -> Any:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "bom", root, "--out", out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "bom.json").read_text())


def test_it_names_every_package_its_licence_and_what_it_needs(tmp_path: Path) -> None:
    libraries = tmp_path / "opt" / "fourstep" / "lib" / "python3.11"
    libraries.mkdir(parents=True)
    os.symlink(sysconfig.get_paths()["purelib"], libraries / "site-packages")
    (tmp_path / "var" / "lib" / "dpkg").mkdir(parents=True)
    (tmp_path / "var" / "lib" / "dpkg" / "status").write_text(DEBIAN)
    found = bill(tmp_path, tmp_path / "out")
    assert found["metadata"]["component"]["name"] == "fourstep"
    parts = {each["purl"]: each for each in found["components"]}
    pillow = parts[f"pkg:pypi/pillow@{importlib.metadata.version('pillow')}"]
    (licence,) = pillow["licenses"]
    assert licence["license"]["id"] == "MIT-CMU"
    assert "pkg:deb/debian/tini@0.19.0-1?arch=amd64" in parts
    assert not any("/gone@" in purl for purl in parts)
    needed = {each["ref"]: each.get("dependsOn", []) for each in found["dependencies"]}
    assert any(
        ref.startswith("pypi:ray@") for ref in needed[found["metadata"]["component"]["bom-ref"]]
    )
    assert Bom.from_json(found).components  # type: ignore[attr-defined]
    page = (tmp_path / "out" / "licences.md").read_text()
    assert "| pillow |" in page.lower()


def test_a_folder_that_is_no_image_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "bom", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no /opt/fourstep" in done.stderr
