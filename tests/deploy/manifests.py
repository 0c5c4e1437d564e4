"""Rendered overlays, and the two kinds of schema that they are held against."""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
VERSIONS = ("1.30", "1.37")  # the oldest that these manifests are for, and the newest known
CLUSTER_WIDE = {"Namespace", "PriorityClass", "StorageClass"}
WITHOUT_SCHEMA = {"PodMonitoring", "Rules"}  # GKE's own kinds: none is at hand
Object = dict[str, Any]


@functools.cache
def kustomize_version() -> int:
    """The major version of the kustomize in kubectl; 0 where there is none that says."""
    if not shutil.which("kubectl"):
        return 0
    shown = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True)
    found = re.search(r"Kustomize Version: v(\d+)", shown.stdout)
    return int(found[1]) if found else 0


@functools.cache
def render(folder: Path) -> list[Object]:
    """What `kubectl apply -k` would send."""
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def overlay(name: str) -> list[Object]:
    return render(KUBERNETES / "overlays" / name)


def with_component(name: str, component: str, folder: Path) -> list[Object]:
    """An overlay of a user's own, in ``folder``: one of ours and a component."""
    above = os.path.relpath(KUBERNETES, folder.resolve())
    (folder / "kustomization.yaml").write_text(
        f"namespace: fourstep\nresources: [{above}/overlays/{name}]\n"
        f"components: [{above}/components/{component}]\n"
    )
    return render(folder)


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    (found,) = [
        each
        for each in objects
        if each["kind"] == kind and name in (None, each["metadata"]["name"])
    ]
    return found


def cluster(objects: list[Object]) -> Object:
    spec: Object = one(objects, "RayService")["spec"]["rayClusterConfig"]
    return spec


def head(objects: list[Object]) -> Object:
    spec: Object = cluster(objects)["headGroupSpec"]["template"]["spec"]
    return spec


def group(objects: list[Object]) -> Object:
    (found,) = cluster(objects)["workerGroupSpecs"]
    assert isinstance(found, dict)
    return found


def replica(objects: list[Object]) -> Object:
    spec: Object = group(objects)["template"]["spec"]
    return spec


def environment(objects: list[Object]) -> dict[str, str]:
    name = head(objects)["containers"][0]["envFrom"][0]["configMapRef"]["name"]
    data: dict[str, str] = one(objects, "ConfigMap", name)["data"]
    return data


def serve_config(objects: list[Object]) -> Object:
    config: Object = yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])
    return config


def check(thing: Object) -> None:
    """Raises where a field is unknown or has a wrong value."""
    _check(json.dumps(thing, sort_keys=True))


def check_all(objects: list[Object]) -> None:
    """Raises where a field is unknown or has a wrong value, two have one name, or one no place."""
    for thing in objects:
        if thing["kind"] not in WITHOUT_SCHEMA:
            check(thing)
        namespace = None if thing["kind"] in CLUSTER_WIDE else "fourstep"
        assert thing["metadata"].get("namespace") == namespace, thing["metadata"]
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in objects]
    assert len(names) == len(set(names))


@functools.cache  # overlays share most of their objects
def _check(text: str) -> None:
    thing = json.loads(text)
    custom = _validator(thing["kind"])
    if custom:
        custom.validate(thing)
        return
    for version in VERSIONS:
        kubernetes_validate.validate(thing, version, strict=True)


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator | None:
    file = KUBERNETES / "schemas" / f"{kind.lower()}.json.gz"
    if not file.exists():
        return None
    return jsonschema.Draft202012Validator(_strict(json.loads(gzip.decompress(file.read_bytes()))))


def _strict(schema: Any) -> Any:
    """As an API server with `fieldValidation: Strict` reads a custom resource's schema."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _strict(value) for key, value in schema.items()}
    known = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if known and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
    return inner
