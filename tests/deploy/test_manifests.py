"""Every overlay renders, and Kubernetes, KubeRay and the Prometheus operator would take it."""

from __future__ import annotations

import copy

import jsonschema
import pytest
import yaml

from tests.deploy.manifests import (
    COMPONENTS,
    KUBERNETES,
    OVERLAYS,
    Object,
    check,
    cluster,
    head,
    one,
    overlay,
    render,
    replica,
)

EXAMPLES = ("ingress.yaml", "secrets.yaml")  # gateway.yaml: its schema is not at hand


def test_what_there_is() -> None:
    assert OVERLAYS == ["aks-a100", "eks-a10g", "gke-l4", "local-cpu", "multi-model"]
    assert COMPONENTS == ["gcs-fault-tolerance", "model-cache", "observability", "scale-to-zero"]


def test_every_object_is_valid(objects: list[Object]) -> None:
    for thing in objects:
        check(thing)
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in objects]
    assert len(names) == len(set(names))
    assert all(
        thing["metadata"].get("namespace") == "fourstep" or thing["kind"] == "Namespace"
        for thing in objects
    )


def test_the_pods_that_kuberay_makes_of_them_are_valid(objects: list[Object]) -> None:
    for spec in (head(objects), replica(objects)):
        check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec})


@pytest.mark.parametrize("file", EXAMPLES)
def test_examples_are_valid(file: str) -> None:
    for thing in yaml.safe_load_all((KUBERNETES / "examples" / file).read_text()):
        check(thing)


def test_scale_to_zero_goes_onto_any_overlay(kubectl: None) -> None:
    folder = KUBERNETES / "overlays" / "gke-l4"
    own = KUBERNETES / "overlays" / ".scale-to-zero"
    own.mkdir()
    try:
        (own / "kustomization.yaml").write_text(
            f"resources: [../{folder.name}]\ncomponents: [../../components/scale-to-zero]\n"
        )
        objects = render(own)
    finally:
        (own / "kustomization.yaml").unlink()
        own.rmdir()
    for thing in objects:
        check(thing)
    assert one(objects, "RayService")["spec"]["excludeHeadPodFromServeSvc"] is False
    assert replica(objects)["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/-/healthz"


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
    pods = [head(objects), replica(objects)]
    pods += [each["spec"]["template"]["spec"] for each in objects if each["kind"] == "StatefulSet"]
    assert len(pods) >= 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        containers = pod["containers"] + pod.get("initContainers", [])
        if pod is head(objects):
            containers.append(cluster(objects)["autoscalerOptions"])
        for container in containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]
