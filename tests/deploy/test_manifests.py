"""Every overlay renders, and Kubernetes, KubeRay and the Prometheus operator would take it."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.deploy.kuberay import pods, serve_service
from tests.deploy.manifests import (
    COMPONENTS,
    KUBERNETES,
    OVERLAYS,
    ROOT,
    Object,
    check,
    check_all,
    group,
    one,
    overlay,
    render,
    replica,
    with_component,
)

EXAMPLES = (
    "alb-ingress.yaml", "cluster-autoscaler.yaml", "dcgm.yaml", "gpu-sharing.yaml", "headroom.yaml",
    "own-cache.yaml", "secrets.yaml",
)  # fmt: skip
OF_OTHERS = {"keda.sh/v1alpha1"}  # whose schema is not at hand


def test_what_there_is() -> None:
    assert OVERLAYS == ["aks-a100", "eks-a10g", "gke-l4", "local-cpu", "multi-model"]
    assert COMPONENTS == [
        "disruption-budget", "gcs-fault-tolerance", "incremental-upgrade", "mig", "model-cache",
        "observability", "observability-gke", "priority", "scale-to-zero", "spot",
    ]  # fmt: skip


def test_every_object_is_valid(objects: list[Object]) -> None:
    check_all(objects)


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_is_applied_needs_no_custom_resources_but_rays_and_gkes_own(
    kubectl: None, name: str
) -> None:
    """One kind that the cluster does not know, and `kubectl apply` fails."""
    one_of_gke = name in ("gke-l4", "multi-model")
    groups = {thing["apiVersion"].rpartition("/")[0] for thing in overlay(name)}
    of_others = {group for group in groups if "." in group and not group.endswith(".k8s.io")}
    assert of_others == {"ray.io"} | ({"monitoring.googleapis.com"} if one_of_gke else set())


@pytest.mark.parametrize("file", EXAMPLES)
def test_examples_are_valid(file: str) -> None:
    for thing in yaml.safe_load_all((KUBERNETES / "examples" / file).read_text()):
        if thing["apiVersion"] not in OF_OTHERS:
            check(thing)


@pytest.mark.parametrize(
    "component",
    ["disruption-budget", "incremental-upgrade", "mig", "observability", "priority",
     "scale-to-zero", "spot"],
)  # fmt: skip
def test_a_component_goes_onto_an_overlay(kubectl: None, component: str, tmp_path: Path) -> None:
    objects = with_component("eks-a10g", component, tmp_path)
    check_all(objects)
    for pod in pods(one(objects, "RayService")):
        check(pod)


def test_an_overlay_of_ones_own_as_the_readme_has_it(kubectl: None, tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "README.md").read_text().partition("### An overlay of your own")[2]
    shown = text.partition("```yaml")[2].partition("```")[0]
    above = os.path.relpath(ROOT, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(shown.replace("../deploy", f"{above}/deploy"))
    objects = render(tmp_path)
    check_all(objects)
    images = {each["image"] for pod in pods(one(objects, "RayService"))
              for each in pod["spec"]["containers"]}  # fmt: skip
    assert images == {"REGISTRY/fourstep:0.1.0-cuda"}
    budget = one(objects, "PodDisruptionBudget")["spec"]
    assert group(objects)["minReplicas"] > budget["minAvailable"], "else no node can be drained"


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "deploy" / "README.md").read_text()
    roots = (ROOT, ROOT / "deploy", KUBERNETES)
    rooms = "deploy|kubernetes|overlays|components|examples|prometheus|helm|tests|service"
    named = set(re.findall(rf"(?<![\w./])(?:{rooms})/[\w./-]*\w", text))
    assert len(named) > 20
    missing = {each for each in named if not any((root / each).exists() for root in roots)}
    assert missing == set()


def test_scale_to_zero_leaves_the_head_to_take_the_first_request(
    kubectl: None, tmp_path: Path
) -> None:
    objects = with_component("gke-l4", "scale-to-zero", tmp_path)
    service = one(objects, "RayService")
    assert group(objects)["minReplicas"] == 0
    head_labels = pods(service)[0]["metadata"]["labels"]
    assert serve_service(service)["spec"]["selector"].items() <= head_labels.items()


def test_on_spot_nodes_a_pod_ends_within_the_notice(kubectl: None, tmp_path: Path) -> None:
    pod = replica(with_component("gke-l4", "spot", tmp_path))
    (drain,) = pod["containers"][0]["env"]
    assert drain["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert float(drain["value"]) + 5 < pod["terminationGracePeriodSeconds"] <= 15, "GKE's"


def test_unknown_fields_and_wrong_values_are_refused(kubectl: None) -> None:
    objects = overlay("local-cpu")
    service = one(objects, "RayService")
    for path, value in (
        (("spec", "serveConfig"), ""),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "maxReplica"), 3),
        (("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containres"), []),
    ):
        wrong = copy.deepcopy(service)
        place = wrong
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            check(wrong)
    policy = copy.deepcopy(one(objects, "NetworkPolicy"))
    policy["spec"]["ingres"] = []
    with pytest.raises(jsonschema.ValidationError, match="ingres"):
        check(policy)


def test_every_pod_runs_with_the_least_rights(objects: list[Object]) -> None:
    made = [pod["spec"] for pod in pods(one(objects, "RayService"))]
    made += [
        each["spec"]["template"]["spec"]
        for each in objects
        if each["kind"] in ("Job", "StatefulSet")
    ]
    for pod in made:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
            assert len(paths) == len(set(paths))
