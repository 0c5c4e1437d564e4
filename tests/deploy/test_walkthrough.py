"""The README's steps to a first image: in an order that works, naming what is there."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler.v2.instance_manager.config import InstanceReconcileConfig

from engines.backends.driver import OLDEST_DRIVERS
from service.ray_serve.scaling import Scaling
from tests.deploy.manifests import KUBERNETES, ROOT, one, overlay, serve_config
from tests.deploy.test_consistency import found, parsed
from tests.deploy.test_image import stages

README = (ROOT / "deploy" / "README.md").read_text()
STEPS = README.partition("## From nothing to a first image")[2]
LAPTOP, GKE = re.findall(r"```sh\n(.*?)```", STEPS, re.S)[:2]


def commands(block: str) -> list[str]:
    """One a line, without comments; continued lines as one."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line and line[0] != "#"]


def place(block: str, beginning: str) -> int:
    """Where the command stands that begins so, or has it after a pipe or an assignment."""
    (found_at,) = [i for i, each in enumerate(commands(block)) if beginning in each]
    return found_at


@pytest.mark.parametrize("block", [LAPTOP, GKE], ids=["laptop", "gke"])
def test_the_namespace_is_there_before_its_secrets_and_these_before_pods(block: str) -> None:
    applied = place(block, "kubectl apply -k")
    made = place(block, "kubectl create namespace fourstep")
    secrets = [i for i, each in enumerate(commands(block)) if "create secret" in each]
    assert made < min(secrets)
    assert max(secrets) < applied
    for i in secrets:
        for file in re.findall(r"--from-file=(\S+)", commands(block)[i]):
            written = [j for j, each in enumerate(commands(block)) if f">{file}" in each]
            assert written, f"nothing has made {file}"
            assert written[0] < i
    assert place(block, "wait rayservice/fourstep") > applied


@pytest.mark.parametrize(("block", "name"), [(LAPTOP, "local-cpu"), (GKE, "gke-l4")])
def test_every_secret_that_pods_want_is_made_with_its_keys(
    kubectl: None, block: str, name: str
) -> None:
    objects = overlay(name)
    text = " ".join(commands(block))
    made = dict(re.findall(r"create secret generic (\S+) ([^;]*?)(?= kubectl|$)", text))
    wanted = set(found(objects, "secretName"))
    wanted |= {each["name"] for each in found(objects, "secretKeyRef")}
    assert wanted == made.keys()
    for reference in found(objects, "secretKeyRef"):
        assert f"--from-literal={reference['key']}=" in made[reference["name"]]


def test_gkes_nodes_have_gpus_their_driver_and_room_for_images(kubectl: None) -> None:
    cluster, pool = (
        commands(GKE)[place(GKE, f"gcloud container {what}")]
        for what in ("clusters create", "node-pools create")
    )
    assert commands(GKE).index(cluster) < commands(GKE).index(pool) < place(GKE, "apply -k")
    options = dict(re.findall(r"--([\w-]+) (\S+)", pool))
    accelerator = dict(each.split("=") for each in options["accelerator"].split(","))
    assert accelerator["gpu-driver-version"] == "latest", "GKE's default is older"
    assert f"NVIDIA's driver {OLDEST_DRIVERS[13]} or newer" in README
    objects = overlay("gke-l4")
    (group,) = one(objects, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    assert accelerator["type"] in pod["nodeSelector"].values()
    assert accelerator["count"] == pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert int(options["max-nodes"]) >= group["maxReplicas"]
    assert "HttpLoadBalancing" in cluster, "a list of add-ons is all there are; Gateways want it"
    assert "--gateway-api standard" in cluster
    assert "--enable-dataplane-v2" in cluster, "without it nobody obeys a network policy"
    for each in (cluster, pool):
        assert int(dict(re.findall(r"--([\w-]+) (\S+)", each))["disk-size"]) >= 100
    storage = one(objects, "StorageClass")["provisioner"]
    assert "GcpFilestoreCsiDriver" in cluster
    assert storage == "filestore.csi.storage.gke.io"
    # The head and the Job lie on the first pool: e2-standard-8 has 8 CPUs and 32 GB.
    (job,) = one(objects, "Job")["spec"]["template"]["spec"]["containers"]
    assert "e2-standard-8" in cluster
    assert int(job["resources"]["requests"]["cpu"]) < 7
    assert job["resources"]["limits"]["memory"] == "24Gi"


@pytest.mark.parametrize(("block", "name"), [(LAPTOP, "local-cpu"), (GKE, "gke-l4")])
def test_the_image_that_is_built_is_the_one_that_is_pulled(
    kubectl: None, block: str, name: str
) -> None:
    words = shlex.split(commands(block)[place(block, "docker build")])
    assert (ROOT / words[words.index("-f") + 1]).exists()
    assert words[words.index("--target") + 1] in stages()
    tag = words[words.index("-t") + 1].rpartition("/")[2]
    images = {
        each.rpartition("/")[2] for each in found(overlay(name), "image") if "fourstep" in each
    }
    assert images == {tag}
    moved = "kind load docker-image" if name == "local-cpu" else "docker push"
    assert place(block, moved) < place(block, "kubectl apply -k")


def test_a_key_is_shown_once_and_its_hash_is_in_the_file(tmp_path: Path) -> None:
    """The line itself, by a shell."""
    (line,) = [each for each in commands(LAPTOP) if each.startswith("KEY=")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shown = subprocess.run(
        ["bash", "-ec", f"{line}; printf %s $KEY"], cwd=tmp_path, env=os.environ | {"PATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    hashed = hashlib.sha256(shown.stdout.encode()).hexdigest()
    assert f"me:{hashed}" in (tmp_path / "api-keys").read_text()


def test_the_commands_are_ours_and_the_address_is_the_services(kubectl: None) -> None:
    for block in (LAPTOP, GKE):
        (key,) = re.findall(r"\((fourstep key \w+)", commands(block)[place(block, "fourstep key")])
        assert parsed(shlex.split(key))["name"] == "me"
    objects = overlay("local-cpu")
    name = one(objects, "RayService")["metadata"]["name"]
    assert f"port-forward svc/{name}-serve-svc 8000" in LAPTOP
    (application,) = serve_config(objects)["applications"]
    assert application["route_prefix"] == "/"
    operator = re.search(r"--version (\S+)", commands(LAPTOP)[place(LAPTOP, "helm install")])
    assert operator
    assert f"KubeRay {operator[1]}" in README


def test_the_job_that_is_waited_for_is_there(kubectl: None) -> None:
    (job,) = re.findall(r"wait job/(\S+)", GKE)
    assert place(GKE, "apply -k") < place(GKE, "wait job/") < place(GKE, "wait rayservice/")
    assert one(overlay("gke-l4"), "Job", job)


def test_what_an_upgrade_is_to_begin_with_is_asked_of_a_field_that_there_is() -> None:
    """How many pods of the old cluster serve; `test_on_ray.py` begins with such a number."""
    upgrade = README.partition("## Upgrade and roll back")[2]
    path, *_ = re.findall(r"jsonpath='\{\.([\w.]+)\}'", upgrade)
    place = json.loads(
        gzip.decompress((KUBERNETES / "schemas" / "rayservice.json.gz").read_bytes())
    )
    for name in path.split("."):
        place = place["properties"][name]
    assert place["type"] == "integer"
    assert "`initial_replicas`" in upgrade
    assert "initial_replicas" in Scaling.model_fields


def test_azures_share_is_one_that_pods_may_write_to(kubectl: None) -> None:
    parameters = one(overlay("aks-a100"), "StorageClass")["parameters"]
    assert parameters["protocol"] == "nfs", "SMB has no owners"
    assert parameters["skuName"].startswith("Premium"), "NFS is Premium's alone"
    assert parameters["mountPermissions"] == "0777", "a new share is root's"


def test_an_hour_is_what_rays_autoscaler_waits_for_a_pod() -> None:
    assert "A pod that has not joined\nRay within an hour is ended by the autoscaler" in README
    assert InstanceReconcileConfig.allocate_status_timeout_s == 3600


def test_nothing_stands_on_what_has_been_retired() -> None:
    """ingress-nginx has had no releases since March 2026."""
    for path in (*KUBERNETES.rglob("*.yaml"), *(ROOT / "deploy" / "helm").rglob("*.yaml")):
        assert "nginx" not in path.read_text(), path
    _, nodes = yaml.safe_load_all((KUBERNETES / "examples" / "karpenter.yaml").read_text())
    assert nodes["spec"]["blockDeviceMappings"][0]["ebs"]["volumeSize"] == "100Gi"
