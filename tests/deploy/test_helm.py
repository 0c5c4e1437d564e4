"""The Helm chart, rendered by Helm's own engine and held against the Kustomize overlays."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import KUBERNETES, ROOT, Object, check_all, one, overlay, with_component

helm = pytest.importorskip("helm_python", reason="no wheel of helm-python-sdk for this system")
FOLDER = ROOT / "deploy" / "helm"
OVERLAYS = ["local-cpu", "gke-l4", "eks-a10g", "aks-a100"]
GENERATED = re.compile(r"(fourstep-(?:environment|model))-[0-9a-z]{10}$")


@pytest.fixture(scope="module")
def chart() -> Iterator[Any]:
    with helm.Chart.load(FOLDER / "fourstep") as loaded:
        yield loaded


def values_of(name: str, **changes: Any) -> Object:
    """An overlay's values, as the command that its file shows gives them."""
    file = FOLDER / f"values-{name}.yaml"
    values: Object = yaml.safe_load(file.read_text()) if file.exists() else {}
    serve = KUBERNETES / "overlays" / name / "serve.yaml"
    return values | {"serveConfig": serve.read_text()} | changes


def rendered(chart: Any, values: Object) -> list[Object]:
    chart.validate_schema(chart.merge_values(values))
    manifests = chart.render(values, name="fourstep", namespace="fourstep")
    texts = [text for path, text in manifests.items() if path.endswith(".yaml")]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def comparable(objects: list[Object]) -> dict[tuple[str, str], Object]:
    """Objects by kind and name, without what the two tools name or note in their own ways."""
    found = {}
    for thing in copy.deepcopy(objects):
        if thing["kind"] == "RayService":
            thing["spec"]["serveConfigV2"] = yaml.safe_load(thing["spec"]["serveConfigV2"])
        if thing["kind"] == "ConfigMap":
            thing["metadata"].pop("annotations", None)
        if thing["kind"] != "Namespace":  # Helm's is there before
            thing = _with_plain_names(thing)
            found[thing["kind"], thing["metadata"]["name"]] = thing
    return found


def _with_plain_names(thing: Any) -> Any:
    if isinstance(thing, dict):
        return {key: _with_plain_names(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [_with_plain_names(each) for each in thing]
    return GENERATED.sub(r"\1", thing) if isinstance(thing, str) else thing


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_chart_is_the_overlay(kubectl: None, chart: Any, name: str) -> None:
    objects = rendered(chart, values_of(name))
    check_all(objects)
    ours, theirs = comparable(objects), comparable(overlay(name))
    assert ours.keys() == theirs.keys()
    for key, thing in ours.items():
        assert thing == theirs[key], key


COMPONENTS: dict[str, Object] = {
    "observability": {"monitoring": {"kind": "operator"}},
    "disruption-budget": {"disruptionBudget": {"enabled": True}},
}


@pytest.mark.parametrize("component", COMPONENTS)
def test_what_values_add_is_the_component(
    kubectl: None, chart: Any, component: str, tmp_path: Path
) -> None:
    values = values_of("eks-a10g", **COMPONENTS[component])
    values["replicas"]["min"] = 2
    ours = comparable(rendered(chart, values))
    theirs = comparable(with_component("eks-a10g", component, tmp_path))
    theirs["RayService", "fourstep"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0][
        "minReplicas"
    ] = 2
    assert ours == theirs


def test_names_follow_what_they_name(chart: Any) -> None:
    """A changed environment is a new cluster, and nothing else is."""

    def name(**values: Any) -> str:
        service = one(rendered(chart, values), "RayService")["spec"]["rayClusterConfig"]
        (source,) = service["headGroupSpec"]["template"]["spec"]["containers"][0]["envFrom"]
        return str(source["configMapRef"]["name"])

    assert name() == name(replicas={"min": 1, "max": 2, "cpus": "2"})
    assert name() != name(environment={"FOURSTEP_TRACES": "1"})
    objects = rendered(chart, {"environment": {"HF_TOKEN_PATH": None}})
    (data,) = [each["data"] for each in objects if each["kind"] == "ConfigMap"]
    assert "HF_TOKEN_PATH" not in data


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"replica": {"min": 1}}, "replica"),
        ({"replicas": {"min": -1}}, "min"),
        ({"monitoring": {"kind": "datadog"}}, "kind"),
        ({"cache": {"model": {"COMPUTE_CAPABILITY": "8.9"}}}, "COMPUTE_CAPABILITY"),
    ],
)
def test_wrong_values_are_refused_by_name(chart: Any, values: Object, word: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=word):
        chart.validate_schema(chart.merge_values(values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replicas": {"min": 4}}, r"replicas\.min is 4 and must be at most replicas\.max, 3"),
        ({"disruptionBudget": {"enabled": True}}, r"replicas\.min is 1.* raise it, or leave"),
    ],
)
def test_values_that_do_not_go_together_say_so(chart: Any, values: Object, words: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=words):
        chart.render(values, name="fourstep", namespace="fourstep")


def test_every_value_is_in_the_schema_and_lint_finds_nothing(chart: Any) -> None:
    schema = json.loads((FOLDER / "fourstep" / "values.schema.json").read_text())
    assert chart.values.keys() == schema["properties"].keys() - {"global"}  # Helm's own
    for name, value in chart.values.items():
        if isinstance(value, dict) and "properties" in schema["properties"][name]:
            assert value.keys() <= schema["properties"][name]["properties"].keys()
    said = helm.lint(FOLDER / "fourstep")
    assert not [each for each in said["messages"] if each["severity"] > 1], said


def test_sources_are_linked_and_not_copied() -> None:
    for file in (FOLDER / "fourstep" / "files").iterdir():
        assert file.is_symlink(), file
        assert file.resolve().is_relative_to(ROOT / "deploy"), file


def test_its_version_is_the_projects(chart: Any) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.+)"$', project, re.M)
    assert chart.metadata["appVersion"] == chart.version == version
    assert chart.values["image"]["tag"] == f"{version}-cpu"
