"""Pods as the operator would make them of every overlay, held against what really answers there."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest
import ray.scripts.scripts
import yaml
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.serve._private.constants import PROXY_MIN_DRAINING_PERIOD_S

from service.ray_serve.proxy_rules import PROBES
from service.replica import Replica
from service.settings import Settings
from service.web.app import build_app
from tests.deploy.kuberay import (
    OPERATOR_LABELS,
    head_pod,
    pods,
    selects,
    serve_service,
    worker_pod,
)
from tests.deploy.manifests import (
    ROOT,
    Object,
    check,
    group,
    one,
    overlay,
    serve_config,
    with_component,
)
from tests.monitoring import RULES

OF_THE_PROXY = {"/-/healthz", "/-/routes"}  # ray/serve/_private/haproxy_templates.py
OF_THE_AGENT = {"/api/healthz"}  # test_on_ray.py asks it
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
CONTAINER_KINDS = ("initContainers", "containers")


@pytest.fixture
def made(objects: list[Object]) -> list[Object]:
    """The pods of an overlay's RayService: the head, then one of each group."""
    return pods(one(objects, "RayService"))


def containers(pod: Object) -> list[Object]:
    return [each for kind in CONTAINER_KINDS for each in pod["spec"].get(kind, [])]


def named_ports(pod: Object) -> dict[str, int]:
    ports = [port for each in containers(pod) for port in each.get("ports", [])]
    return {port["name"]: port["containerPort"] for port in ports}


def variables(container: Object, objects: list[Object]) -> dict[str, str]:
    """A container's environment: what it sets itself goes before what comes from ConfigMaps."""
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        values |= one(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    return values | {each["name"]: each.get("value", "") for each in container.get("env", [])}


def test_pods_and_their_service_are_valid(objects: list[Object], made: list[Object]) -> None:
    service = serve_service(one(objects, "RayService"))
    for thing in (*made, service):
        check(thing)
    serving = [pod for pod in made if selects({"matchLabels": service["spec"]["selector"]},
                                              pod["metadata"]["labels"])]  # fmt: skip
    assert {named_ports(pod)["serve"] for pod in serving} == {service["spec"]["ports"][0]["port"]}
    # A new cluster takes over when its applications run: then only its head is sure to answer.
    assert head_pod(one(objects, "RayService")) in serving


def test_ray_itself_takes_the_commands(made: list[Object]) -> None:
    for pod in made:
        (line,) = pod["spec"]["containers"][0]["args"]
        words = shlex.split(line.partition("; ")[2])
        assert words[:2] == ["ray", "start"]
        given = ray.scripts.scripts.start.make_context("start", words[2:]).params
        assert given["block"]
        asked = pod["spec"]["containers"][0]["resources"]["requests"]
        assert given["num_cpus"] in (0, int(asked["cpu"]))
        assert (given["num_gpus"] or 0) == int(asked.get("nvidia.com/gpu", 0))


def test_probes_ask_what_is_answered(objects: list[Object], made: list[Object]) -> None:
    ours = build_app(Replica(Settings())).openapi()["paths"]
    answered = {8000: set(OF_THE_PROXY), 52365: OF_THE_AGENT, 9400: {"/metrics"}}
    for application in serve_config(objects)["applications"]:
        prefix = application["route_prefix"].rstrip("/")
        answered[8000] |= {prefix + path for path in ours}
    answered[8001] = {path for path in answered[8000] if path.endswith(PROBES)}
    for container in itertools.chain.from_iterable(map(containers, made)):
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            if asked := container.get(kind, {}).get("httpGet"):
                assert asked["path"] in answered[asked["port"]], (container["name"], kind)


def test_the_service_forgets_a_node_before_its_port_closes(objects: list[Object]) -> None:
    """A node without replicas drains: its proxy fails `/-/healthz`, and serves for a while more."""
    service = one(objects, "RayService")
    probe = worker_pod(service, group(objects))["spec"]["containers"][0]["readinessProbe"]
    assert probe["httpGet"] == {"path": "/-/healthz", "port": 8001}
    noticed_s = probe["failureThreshold"] * (probe["periodSeconds"] + probe["timeoutSeconds"])
    # Measured: the first 503 comes 11.8 s after the drain begins; endpoints take seconds to spread.
    assert 12 + noticed_s + 10 < PROXY_MIN_DRAINING_PERIOD_S


def test_what_must_come_again_is_a_sidecar(made: list[Object]) -> None:
    """With autoscaler v2 a pod's containers end for good; KubeRay replaces it for Ray's alone."""
    runbook = (ROOT / "deploy" / "README.md").read_text()
    assert "--previous" not in runbook, "what has not started again has no log of before"
    for pod in made:
        assert pod["spec"]["restartPolicy"] == "Never"
        beside = {each["name"] for each in pod["spec"]["containers"][1:]} - {"autoscaler"}
        assert not beside, "one death of these is for good"
        for sidecar in pod["spec"].get("initContainers", []):
            if sidecar.get("restartPolicy") == "Always":
                assert sidecar["startupProbe"], "what comes after waits for it"
                assert sidecar["resources"]["requests"]["cpu"] == "100m", "a scrape is work"
                assert "readinessProbe" not in sidecar, "it says nothing about who can serve"


SPOT = (  # labels of nodes that go within seconds: GKE's, EKS', Karpenter's, AKS'
    {"cloud.google.com/gke-spot": "true"},
    {"eks.amazonaws.com/capacityType": "SPOT"},
    {"karpenter.sh/capacity-type": "spot"},
    {"kubernetes.azure.com/scalesetpriority": "spot"},
)


def test_the_head_is_where_nobody_takes_it_away(made: list[Object]) -> None:
    head = made[0]
    affinity = head["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert selects(term, {"kubernetes.io/os": "linux", "karpenter.sh/capacity-type": "on-demand"})
    assert not any(selects(term, labels) for labels in SPOT)
    (better,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert not selects(better["preference"], {"cloud.google.com/gke-accelerator": "nvidia-l4"})
    annotations = head["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"


def test_every_pod_may_pull_from_a_registry_that_wants_a_password(
    objects: list[Object], made: list[Object]
) -> None:
    for pod in made:
        account = one(objects, "ServiceAccount", pod["spec"]["serviceAccountName"])
        (secret,) = account["imagePullSecrets"]
        created = f"kubectl -n fourstep create secret docker-registry {secret['name']} "
        assert created in (ROOT / "deploy" / "README.md").read_text()


def test_a_pod_ends_within_its_grace(objects: list[Object], made: list[Object]) -> None:
    drains_s = []
    for pod in made:
        values = variables(pod["spec"]["containers"][0], objects)
        drains_s.append(float(values["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]))
        grace_s = pod["spec"]["terminationGracePeriodSeconds"]
        assert drains_s[-1] + 15 <= grace_s
    assert drains_s[0] <= 15, "the head has no replica: it would wait for nothing"


def allowed(objects: list[Object], source: Object, target: Object, port: int) -> bool:
    """Whether any NetworkPolicy lets a pod, known by its labels and namespace, in at a port."""
    for policy in (each["spec"] for each in objects if each["kind"] == "NetworkPolicy"):
        if not selects(policy["podSelector"], target["metadata"]["labels"]):
            continue
        for rule in policy["ingress"]:
            if port not in [each["port"] for each in rule.get("ports", [{"port": port}])]:
                continue
            if "from" not in rule or any(_is_peer(peer, source) for peer in rule["from"]):
                return True
    return False


def _is_peer(peer: Object, source: Object) -> bool:
    namespace = {"kubernetes.io/metadata.name": source["namespace"]}
    here = (
        selects(peer["namespaceSelector"], namespace)
        if "namespaceSelector" in peer
        else (source["namespace"] == "fourstep")
    )
    return here and selects(peer.get("podSelector", {}), source["labels"])


def test_the_network_lets_through_what_is_needed(objects: list[Object], made: list[Object]) -> None:
    head, *workers = made
    stranger = {"namespace": "default", "labels": {"app.kubernetes.io/name": "somebody"}}
    assert allowed(objects, workers[0]["metadata"], head, 6379)
    assert allowed(objects, head["metadata"], workers[0], 8076)
    for labels in OPERATOR_LABELS:
        operator = {"namespace": "kuberay-system", "labels": labels}
        assert allowed(objects, operator, head, 8265)
        assert allowed(objects, operator, workers[0], 52365)
    for pod in made:
        assert allowed(objects, stranger, pod, 8000)
        assert not any(allowed(objects, stranger, pod, port) for port in (6379, 8265, 52365, 8404))
    egress = one(objects, "NetworkPolicy", "fourstep")["spec"]["egress"]
    outward = {port["port"] for rule in egress for port in rule.get("ports", [])}
    # Name service, hub and API server, a managed Redis, and an OpenTelemetry collector's two.
    assert {53, 443, 6443, 6379, 4317, 4318} <= outward


MONITORED = [
    ("eks-a10g", "observability", {"namespace": "monitoring", "labels": PROMETHEUS}),
    ("gke-l4", "", {"namespace": "gke-gmp-system", "labels": {}}),
]


@pytest.mark.parametrize(("name", "component", "prometheus"), MONITORED)
def test_what_is_open_to_prometheus_is_scraped_and_the_other_way_round(
    kubectl: None, name: str, component: str, prometheus: Object, tmp_path: Path
) -> None:
    objects = with_component(name, component, tmp_path) if component else overlay(name)
    made = pods(one(objects, "RayService"))
    scraped = set()
    for monitor in (each for each in objects if each["kind"] in ("PodMonitor", "PodMonitoring")):
        spec = monitor["spec"]
        for endpoint in spec.get("podMetricsEndpoints") or spec["endpoints"]:
            targets = [
                pod
                for pod in made
                if selects(spec["selector"], pod["metadata"]["labels"])
                and endpoint["port"] in named_ports(pod)
            ]
            assert targets, f"no pod has the port {endpoint['port']} of {monitor['metadata']}"
            scraped |= {named_ports(pod)[endpoint["port"]] for pod in targets}
            for pod in targets:
                assert allowed(objects, prometheus, pod, named_ports(pod)[endpoint["port"]])
    assert scraped == {8080, 9400, AUTOSCALER_METRIC_PORT}


def test_kube_prometheus_stack_looks_at_what_has_its_label(kubectl: None, tmp_path: Path) -> None:
    objects = with_component("eks-a10g", "observability", tmp_path)
    kinds = {"PodMonitor", "PrometheusRule"}
    ours = [each["metadata"] for each in objects if each["kind"] in kinds]
    assert len(ours) == 3
    assert all(each["labels"] == {"release": "kube-prometheus-stack"} for each in ours)


def test_gkes_rules_are_the_same_rules(kubectl: None) -> None:
    rules = one(overlay("gke-l4"), "Rules")
    assert rules["apiVersion"] == "monitoring.googleapis.com/v1"
    assert rules["spec"] == yaml.safe_load(RULES.read_text())
