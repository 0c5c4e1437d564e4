"""The CPU image, built from its Dockerfile by buildah, and its root file system.

No registry is asked: what stands for the pinned base is made by debootstrap under the base's own
name, and pip gets the wheels that this machine's pip found. All else is the Dockerfile's own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.manifests import ROOT

DOCKERFILE = ROOT / "deploy" / "image" / "Dockerfile"
TOOLS = ("buildah", "debootstrap")
MIN_FREE_BYTES = 20 << 30  # vfs keeps a copy of every layer until the root has been taken out
KEEP = "FOURSTEP_IMAGE_ROOT"  # a folder: build into it, or take what a run before has left there
USER = 10001  # of the Dockerfile


@dataclass(frozen=True)
class BuiltImage:
    """An image's root file system, its configuration as Docker has it, and what it took."""

    root: Path
    config: dict[str, Any]
    build_s: float
    size_bytes: int

    @property
    def environment(self) -> dict[str, str]:
        return dict(each.split("=", 1) for each in self.config["Env"])


def what_is_missing() -> str:
    """Why no image can be built here; empty where one can."""
    if os.geteuid() != 0:
        return "the image's own user needs a root that becomes it"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"no {' and no '.join(absent)}: apt install {' '.join(absent)}"
    if _base_version() != sys.version_info[:2]:
        return "its wheels are collected by the Python of the base, and this is another"
    folder = _folder(Path("/var/tmp"))
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if shutil.disk_usage(there).free < MIN_FREE_BYTES:
        return f"it takes {MIN_FREE_BYTES >> 30} GiB for a while"
    return ""


def built(temporary: Path) -> BuiltImage:
    """Build the image into ``temporary``, or find it in the folder that `KEEP` names."""
    folder = _folder(temporary)
    facts = folder / "facts.json"
    if not facts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        wheels = _wheels(folder)
        begin = time.monotonic()
        config = _build(folder, wheels)
        seconds = time.monotonic() - begin
        text = subprocess.run(["du", "-sb", folder / "root"], capture_output=True, text=True).stdout
        facts.write_text(
            json.dumps({"config": config, "build_s": seconds, "size_bytes": int(text.split()[0])})
        )
        shutil.rmtree(wheels)
    return BuiltImage(folder / "root", **json.loads(facts.read_text()))


def _folder(temporary: Path) -> Path:
    return Path(os.environ.get(KEEP) or temporary)


def _base() -> str:
    (base,) = re.findall(r"^FROM (\S+) AS base$", DOCKERFILE.read_text(), re.M)
    return str(base)


def _base_version() -> tuple[int, ...]:
    (version,) = re.findall(r"python:(\d+)\.(\d+)", _base())
    return tuple(int(part) for part in version)


def _wheels(folder: Path) -> Path:
    """What `pip install .` needs, from wherever this machine's pip takes it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = project["project"]["dependencies"] + project["build-system"]["requires"]
    out = folder / "wheels"
    if out.exists():  # of a build that failed
        return out
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", out]
    _run([*command, "-c", ROOT / "deploy" / "constraints.txt", *needed])
    return out


def _build(folder: Path, wheels: Path) -> dict[str, Any]:
    """All of the target ``cpu``; its root lies in ``folder / "root"`` afterwards."""
    storage = folder / "storage"
    buildah = ["buildah", "--root", storage / "root", "--runroot", storage / "run"]
    buildah += ["--storage-driver", "vfs"]
    (folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    try:
        base = _run([*buildah, "from", "scratch"])
        _debootstrap(Path(_run([*buildah, "mount", base])))
        _run([*buildah, "commit", "--quiet", "--rm", base, f"docker.io/library/{_base()}"])
        _run(
            [
                *buildah, "build", "--isolation", "chroot", "--format", "docker", "--pull=never",
                "--layers=false", "--target", "cpu", "--build-arg", "TORCH_INDEX=",
                "--volume", f"{wheels}:/wheels:ro",
                "--volume", f"{folder / 'pip.conf'}:/etc/pip.conf:ro",
                "--file", DOCKERFILE, "--ignorefile", f"{DOCKERFILE}.dockerignore",
                "--tag", "fourstep:built", ROOT,
            ],
            environment={"TMPDIR": str(folder)},  # of caches that a RUN mounts, too
        )  # fmt: skip
        described = json.loads(_run([*buildah, "inspect", "--type", "image", "fourstep:built"]))
        image = _run([*buildah, "from", "--pull-never", "fourstep:built"])
        _run(["cp", "--archive", _run([*buildah, "mount", image]), folder / "root"])
    finally:
        subprocess.run([*map(str, buildah), "umount", "--all"], capture_output=True)
        subprocess.run(["rm", "-rf", storage, folder / "buildah-cache"])
    config: dict[str, Any] = described["Docker"]["config"]
    return config


def _debootstrap(root: Path) -> None:
    """Debian's Python under the names that the official image has: `python` and `pip`."""
    suite = _base().rpartition("-")[2]
    packages = "--include=python3-pip,python3-venv,ca-certificates"
    _run(["debootstrap", "--variant=minbase", packages, suite, root])
    (root / "usr" / "bin" / "python").symlink_to("python3")


def _run(command: list[Any], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | (environment or {}), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()
