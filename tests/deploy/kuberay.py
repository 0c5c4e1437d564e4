"""Pods and the Service as KubeRay 1.7 makes them of a RayService, as far as its fields are used.

Its rules restated, from ray-operator/controllers/ray/common/pod.go and service.go: what it adds to
the templates, what it overrides, what it does not pass on. Names are those of a running cluster.
"""

from __future__ import annotations

import copy
from typing import Any

Object = dict[str, Any]
CLUSTER = "fourstep-abcde"  # RayService's name and a suffix
HEAD_SERVICE = f"{CLUSTER}-head-svc.fourstep.svc.cluster.local"
COMPONENT = {"app.kubernetes.io/component": "kuberay-operator"}
OPERATOR_LABELS = (  # of the operator's own pod, from its chart and from its kustomization
    {"app.kubernetes.io/name": "kuberay-operator", **COMPONENT},
    {"app.kubernetes.io/name": "kuberay", **COMPONENT},
)


def head_pod(service: Object) -> Object:
    """The head with its autoscaler; the controller lets it serve unless it is excluded."""
    cluster = service["spec"]["rayClusterConfig"]
    pod = _pod(cluster["headGroupSpec"]["template"], "head", "headgroup")
    excluded = service["spec"].get("excludeHeadPodFromServeSvc", False)
    pod["metadata"]["labels"]["ray.io/serve"] = "false" if excluded else "true"
    spec = pod["spec"]
    spec.setdefault("serviceAccountName", CLUSTER)
    ray = spec["containers"][0]
    parameters = {"dashboard-host": "0.0.0.0"} | cluster["headGroupSpec"]["rayStartParams"]
    if cluster.get("enableInTreeAutoscaling"):
        parameters["no-monitor"] = "true"
        spec["containers"].append(_autoscaler(ray, cluster["autoscalerOptions"]))
        _set(ray, RAY_enable_autoscaler_v2="true")
    if tolerance := cluster.get("gcsFaultToleranceOptions"):
        _set(ray, RAY_REDIS_ADDRESS=tolerance["redisAddress"])
        ray["env"].append({"name": "REDIS_PASSWORD", **tolerance["redisPassword"]})
        parameters["redis-password"] = "$REDIS_PASSWORD"
    _finish(pod, cluster, "ray start --head", parameters)
    for container in spec["containers"]:
        if container["name"] in ("autoscaler", ray["name"]):
            _mount(pod, container, "ray-logs", "/tmp/ray", {})
    return pod


def worker_pod(service: Object, group: Object) -> Object:
    """A worker, whose own init containers run before the one that waits for the head."""
    cluster = service["spec"]["rayClusterConfig"]
    pod = _pod(group["template"], "worker", group["groupName"])
    pod["metadata"]["labels"]["ray.io/serve"] = "true"
    ray = pod["spec"]["containers"][0]
    waiting = {
        "name": "wait-gcs-ready",  # has the Ray container's env and mounts, but not its envFrom
        "command": ["/bin/bash", "-c", "--"],
        "args": [f"until ray health-check --address {HEAD_SERVICE}:6379; do sleep 5; done"],
        "resources": {kind: {"cpu": "200m", "memory": "256Mi"} for kind in ("limits", "requests")},
    }
    taken = ("image", "imagePullPolicy", "securityContext", "env", "volumeMounts")
    waiting |= {key: copy.deepcopy(ray[key]) for key in taken if key in ray}
    own = pod["spec"].setdefault("initContainers", [])
    own.append(waiting)
    for container in own:
        _set(container, FQ_RAY_IP=HEAD_SERVICE, RAY_IP=HEAD_SERVICE.partition(".")[0])
    _authenticate(waiting)
    if "gcsFaultToleranceOptions" in cluster:
        _set(ray, RAY_gcs_rpc_server_reconnect_timeout_s="600")
    parameters = {"address": f"{HEAD_SERVICE}:6379"} | group["rayStartParams"]
    _finish(pod, cluster, "ray start", parameters)
    return pod


def pods(service: Object) -> list[Object]:
    """The head, and a pod of each worker group."""
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return [head_pod(service), *(worker_pod(service, group) for group in groups)]


def serve_service(service: Object) -> Object:
    """What clients ask: `<name>-serve-svc`, over the pods that may serve and are ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{service['metadata']['name']}-serve-svc", "namespace": "fourstep"},
        "spec": {
            "selector": {"ray.io/cluster": CLUSTER, "ray.io/serve": "true"},
            "ports": [{"name": "serve", "port": 8000, "targetPort": 8000}],
        },
    }


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector, by labels and expressions, chooses what has these labels."""
    for rule in selector.get("matchExpressions", []):
        has = labels.get(rule["key"])
        chosen = {
            "In": has in rule.get("values", []),
            "NotIn": has not in rule.get("values", []),
            "Exists": has is not None,
            "DoesNotExist": has is None,
        }
        if not chosen[rule["operator"]]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def _pod(template: Object, node_type: str, group: str) -> Object:
    template = copy.deepcopy(template)
    labels = {
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        **template.get("metadata", {}).get("labels", {}),
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": CLUSTER,
        "ray.io/node-type": node_type,
        "ray.io/group": group,
    }
    metadata = template.get("metadata", {}) | {"name": f"{CLUSTER}-{group}", "labels": labels}
    metadata["namespace"] = "fourstep"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _autoscaler(ray: Object, options: Object) -> Object:
    container: Object = {
        "name": "autoscaler",
        "image": ray["image"],
        "imagePullPolicy": "IfNotPresent",
        "command": ["/bin/bash", "-c", "--"],
        "args": [f"ray kuberay-autoscaler --cluster-name {CLUSTER} --cluster-namespace fourstep"],
    }
    _refer(container, RAY_HEAD_POD_NAME="metadata.name")
    _set(container, KUBERAY_CRD_VER="v1")
    _authenticate(container)
    for key in ("resources", "securityContext", "envFrom", "volumeMounts"):
        if key in options:
            container[key] = copy.deepcopy(options[key])
    return container


def _finish(pod: Object, cluster: Object, command: str, parameters: dict[str, str]) -> None:
    """What both kinds of pod get: command, environment, token, /dev/shm and how they restart."""
    ray = pod["spec"]["containers"][0]
    limits = ray["resources"].get("limits", {})
    parameters = {
        "metrics-export-port": "8080",
        "dashboard-agent-listen-port": "52365",
        "memory": str(_bytes(limits["memory"])),
        **({"num-gpus": limits["nvidia.com/gpu"]} if "nvidia.com/gpu" in limits else {}),
        **parameters,
        "block": "true",
    }
    words = [
        f"--{name}" if value == "true" else f"--{name}={value}"
        for name, value in sorted(parameters.items())
        if value != "false"
    ]
    ray["command"] = ["/bin/bash", "-c", "--"]
    ray["args"] = [
        f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {command} {' '.join(words)}"
    ]
    _set(ray, RAY_timeout_ms_task_wait_for_death_info="0", RAY_SERVE_KV_TIMEOUT_S="5")
    head = parameters.get("address", "127.0.0.1:6379")
    _set(ray, RAY_gcs_server_request_timeout_seconds="5", RAY_ADDRESS=head)
    # By these autoscaler v2 knows which pod a Ray node is.
    _refer(ray, RAY_CLOUD_INSTANCE_ID="metadata.name")
    _refer(ray, RAY_NODE_TYPE_NAME="metadata.labels['ray.io/group']")
    _authenticate(ray)
    if "metrics" not in [port["name"] for port in ray["ports"]]:
        ray["ports"].append({"name": "metrics", "containerPort": 8080})
    _mount(pod, ray, "shared-mem", "/dev/shm", {"medium": "Memory", "sizeLimit": limits["memory"]})
    if cluster.get("autoscalerOptions", {}).get("version") == "v2":
        pod["spec"]["restartPolicy"] = "Never"  # whatever the template says


def _mount(pod: Object, container: Object, name: str, path: str, empty_dir: Object) -> None:
    mounts = container.setdefault("volumeMounts", [])
    if path in [mount["mountPath"] for mount in mounts]:
        return
    mounts.append({"name": name, "mountPath": path})
    volumes = pod["spec"].setdefault("volumes", [])
    if name not in [volume["name"] for volume in volumes]:
        volumes.append({"name": name, "emptyDir": empty_dir})


def _authenticate(container: Object) -> None:
    _set(container, RAY_AUTH_MODE="token")
    reference = {"name": CLUSTER, "key": "auth_token"}
    container["env"].append({"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": reference}})


def _set(container: Object, **values: str) -> None:
    """Variables that the container does not set itself."""
    own = container.setdefault("env", [])
    taken = {each["name"] for each in own}
    own += [{"name": name, "value": value} for name, value in values.items() if name not in taken]


def _refer(container: Object, **paths: str) -> None:
    """Variables that have the value of a field of the pod."""
    own = container.setdefault("env", [])
    own += [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for name, path in paths.items()]  # fmt: skip


def _bytes(quantity: str) -> int:
    number, unit = quantity[:-2], quantity[-2:]
    return int(number) << {"Mi": 20, "Gi": 30}[unit]
