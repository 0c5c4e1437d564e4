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
from service.ray_serve.scaling import split_args
from service.ray_serve.serve_config import ServeConfig
from service.replica import Replica
from service.settings import Settings, load_settings
from service.web.app import build_app
from tests.deploy.manifests import (
    KUBERNETES,
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
OVERLAYS_WITH_GPU = {"gke-l4": 89, "eks-a10g": 86, "aks-a100": 80}  # compute capability


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


def test_probes_and_ports(objects: list[Object]) -> None:
    paths = set(build_app(Replica(Settings())).openapi()["paths"])
    container, exporter = replica(objects)["containers"]
    probe = container["readinessProbe"]["httpGet"]
    probes_at = environment(objects)["HAPROXY_PROBES"]
    assert probe == {"path": "/readyz", "port": int(probes_at.removeprefix("*:"))}
    assert probe["path"] in paths
    assert probe["port"] in [port["containerPort"] for port in container["ports"]]
    for each in (container, head(objects)["containers"][0]):
        ports = {port["name"]: port["containerPort"] for port in each["ports"]}
        assert (ports["serve"], ports["metrics"]) == (SERVE_PORT, 8080)
    arguments = parsed(exporter["command"])
    assert arguments["port"] == exporter["ports"][0]["containerPort"]
    assert arguments["folder"] == Path(environment(objects)["FOURSTEP_METRICS_DIR"])
    opened = one(objects, "NetworkPolicy")["spec"]["ingress"]
    by_prometheus = [port["port"] for port in opened[-1]["ports"]]
    assert {8080, arguments["port"]} <= set(by_prometheus)
    assert opened[1] == {"ports": [{"port": SERVE_PORT, "protocol": "TCP"}]}


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
    for pod in (head(objects), replica(objects)):
        volumes = {each["name"] for each in pod["volumes"]}
        needed = [(pod["containers"][0], paths)]
        needed += [(each, of_the_build) for each in pod.get("initContainers", [])]
        for container, folders in needed:
            mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes
            for name, folder in folders.items():
                assert any(folder.startswith(mount) for mount in mounts), (name, folder)
        # That of the metrics is there before a replica writes to it: it is a mount itself.
        mounts = {each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        assert paths["FOURSTEP_METRICS_DIR"] in mounts


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
    for pod in (head(objects), replica(objects)):
        assert pod["terminationGracePeriodSeconds"] > drain_s
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
    images = {image for image in found(objects, "image") if image.startswith("fourstep")}
    version = importlib.metadata.version("fourstep")
    assert images in ({f"fourstep:{version}-cpu"}, {f"fourstep:{version}-cuda"})


@pytest.mark.parametrize("name", OVERLAYS_WITH_GPU)
def test_the_bundle_that_is_built_is_the_model_that_is_served(kubectl: None, name: str) -> None:
    objects = overlay(name)
    (init,) = replica(objects)["initContainers"]
    model = one(objects, "ConfigMap", init["envFrom"][1]["configMapRef"]["name"])["data"]
    (application,) = serve_config(objects)["applications"]
    assert application["args"]["model"] == model["BUNDLE"]
    words = ["fourstep", "build", model["MODEL"], "--out", model["BUNDLE"]]
    options = parsed([*words, *shlex.split(model["BUILD_OPTIONS"])])
    assert options["engine"] == application["args"]["engine"]
    assert options["max_batch"] == application["args"]["max_batch"]
    assert OVERLAYS_WITH_GPU[name] in options["compute_capability"]


def test_what_is_scraped_has_a_port_of_that_name(objects: list[Object]) -> None:
    templates = [cluster(objects)["headGroupSpec"]["template"], group(objects)["template"]]
    for monitor in (each for each in objects if each["kind"] == "PodMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"].items()
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        chosen = [each for each in templates if labels <= each["metadata"]["labels"].items()]
        assert chosen
        for template in chosen:
            listed = found(template["spec"]["containers"], "ports")
            assert endpoint["port"] in [port["name"] for ports in listed for port in ports]


def test_every_alert_has_its_place_in_the_runbook(kubectl: None) -> None:
    groups = one(overlay("gke-l4"), "PrometheusRule")["spec"]["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert alerts
    runbook = (ROOT / "deploy" / "README.md").read_text()
    for alert in alerts:
        assert f"\n### {alert['alert']}\n" in runbook
        assert alert["annotations"]["runbook_url"] == f"deploy/README.md#{alert['alert'].lower()}"


def test_what_stands_before_the_service_lets_through_what_it_takes() -> None:
    limits = Settings.model_fields
    (longest_s,) = [each.le for each in limits["request_timeout_s"].metadata if hasattr(each, "le")]
    ingress = yaml.safe_load((KUBERNETES / "examples" / "ingress.yaml").read_text())
    said = {key.rpartition("/")[2]: v for key, v in ingress["metadata"]["annotations"].items()}
    assert int(said["proxy-body-size"]) == Settings().max_body_bytes
    assert int(said["proxy-read-timeout"]) > longest_s
    assert said["proxy-buffering"] == "off"
    service = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    name = yaml.safe_load((KUBERNETES / "base" / "rayservice.yaml").read_text())["metadata"]["name"]
    assert service == {"name": f"{name}-serve-svc", "port": {"number": SERVE_PORT}}
    route = yaml.safe_load((KUBERNETES / "examples" / "gateway.yaml").read_text())
    (rule,) = route["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": f"{name}-serve-svc", "port": SERVE_PORT}]
    assert int(rule["timeouts"]["request"].removesuffix("s")) > longest_s
