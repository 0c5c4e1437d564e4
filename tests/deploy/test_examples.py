"""Examples and components name what is there: nodes, resources, services, metrics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _node_type_from_group_spec

from tests.deploy.kuberay import pods, selects
from tests.deploy.manifests import (
    KUBERNETES,
    Object,
    group,
    one,
    overlay,
    replica,
    with_component,
)
from tests.deploy.test_consistency import example
from tests.deploy.test_grafana import PANELS, expressions
from tests.deploy.test_helm import FOLDER, chart, helm, rendered, values_of  # noqa: F401
from tests.deploy.test_pods import SPOT
from tests.monitoring import names_in


def ray_start(pod: Object) -> dict[str, str]:
    (line,) = pod["spec"]["containers"][0]["args"]
    return dict(re.findall(r"--([\w-]+)=(\S+)", line))


@pytest.mark.parametrize("component", ["", "mig"])
def test_the_autoscaler_counts_what_a_pod_says_of_itself(
    kubectl: None, component: str, tmp_path: Path
) -> None:
    """Ray reads a group's resources from the RayCluster; a node tells its own by `ray start`."""
    objects = with_component("aks-a100", component, tmp_path) if component else overlay("aks-a100")
    counted = _node_type_from_group_spec(group(objects), is_head=False)["resources"]
    said = ray_start(pods(one(objects, "RayService"))[1])
    assert counted["GPU"] == int(said["num-gpus"]) == 1
    assert counted["CPU"] == int(said["num-cpus"])
    assert counted["memory"] == int(said["memory"])


def test_a_part_of_a_gpu_is_asked_for_in_place_of_a_whole_one(
    kubectl: None, tmp_path: Path
) -> None:
    resources = replica(with_component("aks-a100", "mig", tmp_path))["containers"][0]["resources"]
    for kind in ("requests", "limits"):
        assert resources[kind]["nvidia.com/mig-3g.40gb"] == "1"
        assert "nvidia.com/gpu" not in resources[kind]


def test_the_head_goes_before_replicas_and_both_before_others(
    kubectl: None, tmp_path: Path
) -> None:
    objects = with_component("eks-a10g", "priority", tmp_path)
    values = {
        each["metadata"]["name"]: each["value"]
        for each in objects
        if each["kind"] == "PriorityClass"
    }
    head, worker = pods(one(objects, "RayService"))
    head_value, worker_value = (values[pod["spec"]["priorityClassName"]] for pod in (head, worker))
    assert 1_000_000_000 > head_value > worker_value > 0, "the system's own are above"
    (headroom,) = [each for each in example("headroom.yaml") if each["kind"] == "PriorityClass"]
    assert headroom["value"] < 0, "gives way to every pod"


def test_on_spot_nodes_where_there_are_any(kubectl: None, tmp_path: Path) -> None:
    affinity = replica(with_component("eks-a10g", "spot", tmp_path))["affinity"]["nodeAffinity"]
    assert list(affinity) == ["preferredDuringSchedulingIgnoredDuringExecution"]
    (preferred,) = affinity.values()
    for labels in SPOT:
        assert any(selects(each["preference"], labels) for each in preferred), labels
    assert not any(selects(each["preference"], {"kubernetes.io/os": "linux"}) for each in preferred)


def test_replicas_are_spread_over_zones(objects: list[Object]) -> None:
    (spread,) = replica(objects)["topologySpreadConstraints"]
    assert spread["topologyKey"] == "topology.kubernetes.io/zone"
    assert spread["whenUnsatisfiable"] == "ScheduleAnyway", "a zone without a GPU stops nobody"
    template = group(objects)["template"]
    assert selects(spread["labelSelector"], template["metadata"]["labels"])


def test_the_headroom_is_as_large_as_a_replicas_pod(kubectl: None) -> None:
    objects = overlay("gke-l4")
    _, deployment, scaler = example("headroom.yaml")
    held, ours = deployment["spec"]["template"]["spec"], replica(objects)
    asked = ours["containers"][0]["resources"]["requests"]
    for name in ("cpu", "memory", "nvidia.com/gpu"):
        assert held["containers"][0]["resources"]["requests"][name] == asked[name]
    assert held["nodeSelector"] == ours["nodeSelector"]
    assert held["tolerations"] == ours["tolerations"]
    assert scaler["spec"]["scaleTargetRef"] == {"name": deployment["metadata"]["name"]}
    asks = [each["metadata"]["query"] for each in scaler["spec"]["triggers"]
            if each["type"] == "prometheus"]  # fmt: skip
    shown = {name for panel in PANELS for each in expressions(panel) for name in names_in(each)}
    assert names_in(asks[0])
    assert names_in(asks[0]) <= shown


def test_karpenters_nodes_are_those_of_the_overlay(kubectl: None) -> None:
    pool, _ = example("karpenter.yaml")
    rules = {
        each["key"]: each["values"] for each in pool["spec"]["template"]["spec"]["requirements"]
    }
    ours = replica(overlay("eks-a10g"))
    assert rules["node.kubernetes.io/instance-type"] == [*ours["nodeSelector"].values()]
    tolerated = {each["key"] for each in ours["tolerations"]}
    assert {each["key"] for each in pool["spec"]["template"]["spec"]["taints"]} <= tolerated
    most = group(overlay("eks-a10g"))["maxReplicas"]
    assert int(pool["spec"]["limits"]["nvidia.com/gpu"]) >= most


def test_node_groups_of_the_cluster_autoscaler_are_patterns() -> None:
    (found,) = example("cluster-autoscaler.yaml")
    assert found["metadata"]["name"] == "cluster-autoscaler-priority-expander"
    priorities = yaml.safe_load(found["data"]["priorities"])
    best, *others = sorted(priorities, reverse=True)
    assert any(re.search(each, "eks-gpu-spot-1a") for each in priorities[best])
    assert not any(re.search(each, "eks-gpu-1a") for each in priorities[best])
    assert any(re.search(each, "eks-gpu-1a") for number in others for each in priorities[number])


def test_what_is_sliced_is_what_replicas_ask_for(kubectl: None) -> None:
    (found,) = example("gpu-sharing.yaml")
    plans = {name: yaml.safe_load(text) for name, text in found["data"].items()}
    assert {plan["version"] for plan in plans.values()} == {"v1"}
    (sliced,) = plans["two-replicas"]["sharing"]["timeSlicing"]["resources"]
    assert sliced["name"] in replica(overlay("gke-l4"))["containers"][0]["resources"]["limits"]


def test_a_canary_is_a_second_release_behind_one_route(kubectl: None, chart: Any) -> None:  # noqa: F811
    route, grant = example("canary.yaml")
    by_name, by_share = route["spec"]["rules"]
    assert by_name["matches"][0]["headers"]
    assert sum(each["weight"] for each in by_share["backendRefs"]) == 100
    for rule in (by_name, by_share):
        assert rule["timeouts"] == example("gateway.yaml")[0]["spec"]["rules"][0]["timeouts"]
    (canary,) = by_name["backendRefs"]
    assert canary in [{k: v for k, v in each.items() if k != "weight"}
                      for each in by_share["backendRefs"]]  # fmt: skip
    assert grant["metadata"]["namespace"] == canary["namespace"]
    assert grant["spec"]["from"][0]["namespace"] == route["metadata"]["namespace"]
    assert grant["spec"]["to"][0]["name"] == canary["name"]
    values = values_of("gke-l4")
    values["cache"].pop("storageClass")
    again = rendered(chart, values)
    assert not [each for each in again if each["kind"] == "StorageClass"], (
        "the first release has it"
    )
    claim = one(again, "PersistentVolumeClaim", "fourstep-cache")
    assert claim["spec"]["storageClassName"] == "fourstep-cache"


def test_an_upgrade_is_blue_green_or_step_by_step(kubectl: None, tmp_path: Path) -> None:
    """KubeRay's own names for its strategies, and the schema's (`test_manifests.py`)."""
    green = one(overlay("gke-l4"), "RayService")["spec"]["upgradeStrategy"]
    assert green == {"type": "NewCluster"}
    steps = one(with_component("gke-l4", "incremental-upgrade", tmp_path), "RayService")
    options = steps["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100


def test_every_example_is_named_in_the_readme() -> None:
    text = (KUBERNETES.parent / "README.md").read_text()
    for file in (KUBERNETES / "examples").iterdir():
        assert file.name in text, file.name
    for component in (KUBERNETES / "components").iterdir():
        assert f"| `{component.name}` |" in text
