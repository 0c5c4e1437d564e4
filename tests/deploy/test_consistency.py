"""What the manifests say is what the code says: names, ports, paths, limits, times."""

from __future__ import annotations

import importlib.metadata
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from service.cli import app as command
from service.ray_serve.environment import ray_environment
from service.ray_serve.haproxy import PROBES_AT
from service.ray_serve.scaling import split_args
from service.ray_serve.serve_config import ServeConfig
from service.settings import Settings, load_settings
from tests.deploy.manifests import (
    KUBERNETES,
    OVERLAYS,
    ROOT,
    Object,
    cluster,
    environment,
    group,
    head,
    one,
    overlay,
    replica,
    serve_config,
)

SERVE_PORT = 8000
IMAGE_BIN = "/opt/fourstep/bin"  # of the Dockerfile
CAPABILITIES = {"gke-l4": "89", "eks-a10g": "86"}  # of the GPUs whose plans are built


@pytest.fixture
def config(objects: list[Object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServeConfig:
    """The overlay's serveConfigV2 as the code reads it, in the overlay's environment."""
    for name, value in environment(objects).items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "serve.yaml"
    file.write_text(one(objects, "RayService")["spec"]["serveConfigV2"])
    return ServeConfig.from_file(file)


def test_the_environment_is_that_of_the_service_on_every_node(objects: list[Object]) -> None:
    found = environment(objects)
    expected = {
        name: value.replace(str(Path(sys.executable).parent), IMAGE_BIN)
        for name, value in ray_environment("/run/fourstep").items()
    }
    assert {name: found.get(name) for name in expected} == expected
    everywhere = [head(objects)["containers"][0], replica(objects)["containers"][0]]
    everywhere.append(cluster(objects)["autoscalerOptions"])
    assert len({str(each["envFrom"]) for each in everywhere}) == 1


def test_every_application_loads_through_rays_schema_and_our_builder(
    objects: list[Object], config: ServeConfig
) -> None:
    assert not set(config.ignored) - {"http_options", "proxy_location"}
    assert serve_config(objects)["http_options"] == {"host": "0.0.0.0", "port": SERVE_PORT}
    for application in config.applications:
        built = application.build()._bound_deployment
        scaling, values = split_args(application.args)
        assert built._deployment_config.autoscaling_config.max_replicas == scaling.max_replicas
        assert built.ray_actor_options["num_gpus"] == scaling.num_gpus
        assert load_settings(values).api_keys_file == Path("/etc/fourstep/keys/api-keys")


def test_a_pod_has_room_for_its_replicas(objects: list[Object], config: ServeConfig) -> None:
    ours, container = group(objects), replica(objects)["containers"][0]
    requests = container["resources"]["requests"]
    assert ours["rayStartParams"]["num-cpus"] == requests["cpu"]
    num_pods = 0.0
    for application in config.applications:
        scaling, _ = split_args(application.args)
        surge = math.ceil(scaling.largest * scaling.max_surge_percent / 100)
        gpus, cpus = float(requests.get("nvidia.com/gpu", 0)), float(requests["cpu"])
        assert scaling.num_gpus <= gpus
        assert scaling.num_cpus <= cpus
        if scaling.num_gpus or not gpus:
            share = max(scaling.num_gpus / (gpus or 1), scaling.num_cpus / cpus if not gpus else 0)
            num_pods += (scaling.largest + surge) * share
    assert ours["minReplicas"] <= num_pods <= ours["maxReplicas"]


def test_the_kubelet_asks_where_probes_are_answered(objects: list[Object]) -> None:
    container = replica(objects)["containers"][0]
    probes_at = environment(objects)[PROBES_AT]
    probe = container["readinessProbe"]["httpGet"]
    assert probe == {"path": "/-/healthz", "port": int(probes_at.removeprefix("*:"))}
    assert probe["port"] in [port["containerPort"] for port in container["ports"]]


def test_ports_have_their_names(objects: list[Object]) -> None:
    for each in (replica(objects)["containers"][0], head(objects)["containers"][0]):
        ports = {port["name"]: port["containerPort"] for port in each["ports"]}
        assert (ports["serve"], ports["metrics"]) == (SERVE_PORT, 8080)
    (exporter,) = [
        each for each in replica(objects)["initContainers"] if each["name"] == "exporter"
    ]
    arguments = parsed(exporter["command"])
    assert arguments["port"] == exporter["ports"][0]["containerPort"]
    assert arguments["folder"] == Path(environment(objects)["FOURSTEP_METRICS_DIR"])
    (mount,) = exporter["volumeMounts"]
    assert Path(mount["mountPath"]) == arguments["folder"]


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of a `fourstep` command line, as the command itself reads them."""
    assert words[0] == "fourstep"
    group = typer.main.get_command(command)
    sub = group.commands[words[1]]  # type: ignore[attr-defined]
    parameters: dict[str, Any] = sub.make_context(words[1], list(words[2:])).params
    return parameters


def test_whatever_is_written_lies_on_a_volume(objects: list[Object]) -> None:
    paths = {
        key: value
        for key, value in environment(objects).items()
        if value.startswith("/") and not value.startswith(IMAGE_BIN)
    }
    of_the_build = {key: paths[key] for key in ("HF_HOME", "HF_TOKEN_PATH", "HOME")}
    needed = [(pod, paths) for pod in (head(objects), replica(objects))]
    needed += [
        (each["spec"]["template"]["spec"], of_the_build)
        for each in objects
        if each["kind"] == "Job"
    ]
    for pod, folders in needed:
        mounts = {each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        for name, folder in folders.items():
            assert any(folder.startswith(mount) for mount in mounts), (name, folder)
        # That of the metrics is there before a replica writes to it: it is a mount itself.
        assert folders.get("FOURSTEP_METRICS_DIR") in {None, *mounts}


def test_a_unix_socket_has_room_for_its_name(objects: list[Object]) -> None:
    """HAProxy takes 97 characters; Ray puts the node's id, 56 of them, before the last part."""
    socket = Path(environment(objects)["RAY_SERVE_HAPROXY_SOCKET_PATH"])
    assert len(str(socket.parent / ("0" * 56) / socket.name)) <= 97


def test_kubernetes_puts_no_variables_of_its_own_among_the_settings(objects: list[Object]) -> None:
    """A service `fourstep-...` would become FOURSTEP_..._HOST, an unknown setting."""
    assert head(objects)["enableServiceLinks"] is False
    assert replica(objects)["enableServiceLinks"] is False


def test_a_pod_has_time_to_drain(objects: list[Object], config: ServeConfig) -> None:
    drain_s = float(environment(objects)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    for application in config.applications:
        stopping_s = application.build()._bound_deployment._deployment_config
        assert stopping_s.graceful_shutdown_timeout_s < drain_s
        assert application.settings.request_timeout_s < drain_s
    assert one(objects, "RayService")["spec"]["rayClusterDeletionDelaySeconds"] >= drain_s


def test_secrets_are_keys_of_the_example(objects: list[Object]) -> None:
    examples = yaml.safe_load_all((KUBERNETES / "examples" / "secrets.yaml").read_text())
    keys = {each["metadata"]["name"]: set(each["stringData"]) for each in examples}
    assert set(found(objects, "secretName")) <= keys.keys()
    for reference in found(objects, "secretKeyRef"):
        assert reference["key"] in keys[reference["name"]]
    for name in ("FOURSTEP_API_KEYS_FILE", "HF_TOKEN_PATH"):
        assert Path(environment(objects)[name]).name in keys["fourstep-keys"]


def found(thing: Any, key: str) -> list[Any]:
    """Every value of ``key``, at any depth."""
    if isinstance(thing, list):
        return [each for item in thing for each in found(item, key)]
    if isinstance(thing, dict):
        own = [thing[key]] if key in thing else []
        return own + [each for item in thing.values() for each in found(item, key)]
    return []


def test_versions_are_those_of_the_project(objects: list[Object]) -> None:
    assert cluster(objects)["rayVersion"] == importlib.metadata.version("ray")
    images = {image.rpartition("/")[2] for image in found(objects, "image")}
    ours = {image for image in images if image.startswith("fourstep")}
    version = importlib.metadata.version("fourstep")
    assert ours in ({f"fourstep:{version}-cpu"}, {f"fourstep:{version}-cuda"})


def test_only_a_laptops_image_has_no_registry(kubectl: None) -> None:
    """Without one a node would ask Docker Hub for a stranger's image of that name."""
    for name in OVERLAYS:
        ours = {image for image in found(overlay(name), "image") if "fourstep" in image}
        assert all("/" in image for image in ours) == (name != "local-cpu")


def model_of(objects: list[Object]) -> dict[str, str]:
    """What the Job that fills the cache is told, besides the environment of all."""
    (fill,) = one(objects, "Job", "fourstep-model")["spec"]["template"]["spec"]["containers"]
    name = fill["envFrom"][1]["configMapRef"]["name"]
    data: dict[str, str] = one(objects, "ConfigMap", name)["data"]
    return data


@pytest.mark.parametrize("name", CAPABILITIES)
def test_the_bundle_that_is_built_is_the_model_that_is_served(kubectl: None, name: str) -> None:
    objects = overlay(name)
    model = model_of(objects)
    (application,) = serve_config(objects)["applications"]
    assert application["args"]["model"] == model["BUNDLE"]
    words = ["fourstep", "build", model["MODEL"], "--out", model["BUNDLE"]]
    words += [*shlex.split(model["BUILD_OPTIONS"]), "--compute-capability"]
    options = parsed([*words, model["COMPUTE_CAPABILITY"]])
    assert options["engine"] == application["args"]["engine"]
    assert options["max_batch"] == application["args"]["max_batch"]
    assert options["compute_capability"] == [int(CAPABILITIES[name])], "one takes 10 GB as it is"


def test_an_a100_draws_with_torch_from_the_checkpoint_that_is_fetched(kubectl: None) -> None:
    """NVIDIA's support matrix of TensorRT-RTX has no compute capability 8.0."""
    objects = overlay("aks-a100")
    model = model_of(objects)
    (application,) = serve_config(objects)["applications"]
    assert application["args"]["engine"] == "torch"
    assert (application["args"]["model"], model["BUNDLE"]) == (model["MODEL"], "")


@pytest.mark.parametrize("name", [*CAPABILITIES, "aks-a100"])
def test_a_cloud_overlay_brings_the_storage_class_that_it_names(kubectl: None, name: str) -> None:
    objects = overlay(name)
    claim = one(objects, "PersistentVolumeClaim", "fourstep-cache")["spec"]
    storage = one(objects, "StorageClass", claim["storageClassName"])
    assert claim["accessModes"] == ["ReadWriteMany"]
    user = str(replica(objects)["securityContext"]["runAsUser"])
    if storage["provisioner"] == "efs.csi.aws.com":
        assert (storage["parameters"]["uid"], storage["parameters"]["gid"]) == (user, user)
    if storage["provisioner"] == "filestore.csi.storage.gke.io":
        assert claim["resources"]["requests"]["storage"] == "1Ti", "a Basic volume has no less"


def test_a_disruption_budget_lets_nodes_be_drained(objects: list[Object]) -> None:
    for budget in (each for each in objects if each["kind"] == "PodDisruptionBudget"):
        assert group(objects)["minReplicas"] > budget["spec"]["minAvailable"]


def test_every_alert_has_its_place_in_the_runbook(kubectl: None) -> None:
    groups = one(overlay("gke-l4"), "Rules")["spec"]["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert alerts
    runbook = (ROOT / "deploy" / "README.md").read_text()
    for alert in alerts:
        assert f"\n### {alert['alert']}\n" in runbook


def example(name: str) -> list[Object]:
    return list(yaml.safe_load_all((KUBERNETES / "examples" / name).read_text()))


def test_what_stands_before_the_service_waits_as_long_and_asks_the_proxy(kubectl: None) -> None:
    limits = Settings.model_fields["request_timeout_s"].metadata
    (longest_s,) = [each.le for each in limits if hasattr(each, "le")]
    name = one(overlay("local-cpu"), "RayService")["metadata"]["name"]
    (ingress,) = example("alb-ingress.yaml")
    said = {key.rpartition("/")[2]: v for key, v in ingress["metadata"]["annotations"].items()}
    idle = dict([said["load-balancer-attributes"].split("=")])
    assert int(idle["idle_timeout.timeout_seconds"]) > longest_s
    assert said["healthcheck-path"] == "/-/healthz"
    service = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert service == {"name": f"{name}-serve-svc", "port": {"number": SERVE_PORT}}

    (route,) = example("gateway.yaml")
    (rule,) = route["spec"]["rules"]
    assert int(rule["timeouts"]["request"].removesuffix("s")) > longest_s
    _, gke_route, backend, health = example("gke-gateway.yaml")
    for (each,) in (rule["backendRefs"], gke_route["spec"]["rules"][0]["backendRefs"]):
        assert each == {"name": f"{name}-serve-svc", "port": SERVE_PORT}
    assert backend["spec"]["default"]["timeoutSec"] > longest_s
    asked = health["spec"]["default"]["config"]["httpHealthCheck"]
    assert asked == {"port": SERVE_PORT, "requestPath": "/-/healthz"}
    for policy in (backend, health):
        assert policy["spec"]["targetRef"]["name"] == f"{name}-serve-svc"
