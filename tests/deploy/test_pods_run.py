"""Pods of the rendered overlays, run by hand from the built image: to a picture, and to their end.

`tests/deploy/kuberay.py` makes the pods, bubblewrap runs their containers (`container.py`), probes,
sidecars and ends are as a kubelet has them (`kubelet.py`), addresses and rules as the network
policies have them (`pod_network.py`), and Ray's own autoscaler asks for pods (`control_plane.py`).

    python -m pytest -m slow tests/deploy/test_pods_run.py
"""

from __future__ import annotations

import base64
import copy
import io
import shutil
import signal
import socket
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image

from tests.deploy.built_image import USER, BuiltImage
from tests.deploy.container import TOOLS
from tests.deploy.control_plane import ControlPlane
from tests.deploy.kubelet import Pod
from tests.deploy.load import LINE, SECRET, Load
from tests.deploy.manifests import KUBERNETES, Object, cluster, one, render

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(shutil.which(tool) is None for tool in TOOLS),
        reason=f"apt install bubblewrap nftables iproute2: {', '.join(TOOLS)} are needed",
    ),
]
KEYS = {"api-keys": f"{LINE}\n", "hub-token": ""}
GPU_OVERLAYS = ("gke-l4", "eks-a10g", "aks-a100", "multi-model")


def on_cpus(objects: list[Object]) -> list[Object]:
    """An overlay without what is not here: GPUs, a hub, and maybe Redis."""
    objects = copy.deepcopy(objects)
    service = one(objects, "RayService")
    (group,) = cluster(objects)["workerGroupSpecs"]
    if shutil.which("redis-server") is None:
        cluster(objects).pop("gcsFaultToleranceOptions", None)
    for kind in ("requests", "limits"):
        resources = group["template"]["spec"]["containers"][0]["resources"][kind]
        resources.pop("nvidia.com/gpu", None)
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    for application in config["applications"]:
        arguments = application["args"]
        if "/" in arguments["model"] and not arguments["model"].startswith("/"):
            arguments["model"] = "demo-lcm"
        if arguments.pop("num_gpus", 0):
            arguments |= {"engine": "onnxruntime", "num_threads": 1, "num_cpus": 1}
            arguments["max_replicas"] = 2
    service["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    for each in objects:
        data = each.get("data", {})
        if "BUNDLE" in data:
            data |= {"MODEL": "demo-lcm", "BUILD_OPTIONS": "--precision fp32"}
            data["COMPUTE_CAPABILITY"] = ""
    return objects


def ask(plane: ControlPlane, pod: Pod, *, route: str = "", **more: object) -> httpx.Response:
    """A picture, asked for by somebody from outside of Ray's pods, at a pod's own proxy."""
    body = {"prompt": "a large red star", "seed": 1, "response_format": "b64_json"} | more

    def work() -> httpx.Response:
        url = f"http://{pod.address}:8000{route}/v1/images/generations"
        headers = {"Authorization": f"Bearer {SECRET}"}
        return httpx.post(url, json=body, headers=headers, timeout=120)

    return plane.network.inside("stranger", work)


def picture(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))


def opens(plane: ControlPlane, source: str, address: str, port: int) -> bool:
    """Whether a connection comes about; what a rule drops is not answered."""

    def work() -> bool:
        try:
            socket.create_connection((address, port), timeout=1.5).close()
        except OSError:
            return False
        return True

    return plane.network.inside(source, work)


def test_a_picture_comes_through_every_proxy(local: ControlPlane) -> None:
    pictures = [picture(ask(local, pod)) for pod in local.pods.values()]
    assert [each.size for each in pictures] == [(128, 128)] * 2
    assert pictures[0].tobytes() == pictures[1].tobytes(), "one replica, whichever proxy"
    without = local.network.inside(
        "stranger",
        lambda: httpx.post(f"http://{local.workers[0].address}:8000/v1/images/generations",
                           json={"prompt": "x"}),
    )  # fmt: skip
    assert without.status_code == 401


def test_a_container_is_the_images_user_who_may_write_where_a_volume_is(
    local: ControlPlane,
) -> None:
    for name in ("head", local.workers[0].name):
        container = local.pods[name].containers[0]
        said = container.run(["sh", "-c", "id -u; id -g; touch /x /opt/fourstep/x; env"])
        assert said.stdout.split()[:2] == [str(USER), str(USER)]
        assert said.stderr.count("Read-only file system") == 2
        assert "FOURSTEP_SERVE_SVC" not in said.stdout
        status = container.run(["grep", "-E", "^(NoNewPrivs|CapEff|CapBnd)", "/proc/self/status"])
        values = [line.split()[1] for line in status.stdout.splitlines()]
        assert values == ["0" * 16, "0" * 16, "1"]
        for folder in ("/tmp", "/run/fourstep", "/run/fourstep/metrics", "/var/cache/fourstep",
                       "/dev/shm"):  # fmt: skip
            done = container.run(["sh", "-c", f"touch {folder}/x && rm {folder}/x"])
            assert done.returncode == 0, (folder, done.stderr)
        assert container.run(["sh", "-c", "echo >> /etc/fourstep/keys/api-keys"]).returncode


def test_the_network_is_as_the_policy_has_it(local: ControlPlane) -> None:
    head, worker = local.pods["head"], local.workers[0]
    for port in (6379, 8265, 52365, 8404, 8080, 44217):
        assert not opens(local, "stranger", head.address, port), port
    assert opens(local, "stranger", head.address, 8000)
    for address, port in ((head.address, 8265), (worker.address, 52365)):
        assert opens(local, "operator", address, port)
    assert not opens(local, "operator", head.address, 6379)
    for address, port in ((head.address, 8080), (head.address, 44217), (worker.address, 9400)):
        assert opens(local, "prometheus", address, port), port
    assert not opens(local, "prometheus", head.address, 8265)
    # Outwards: each other, and of strangers what has a port for it.
    listener = local.network.inside("stranger", lambda: _listener(local, 9999))
    redis = local.network.inside("stranger", lambda: _listener(local, 6379))
    with listener, redis:
        stranger = local.network.addresses["stranger"]
        assert opens(local, head.name, worker.address, 8080)
        assert not opens(local, worker.name, stranger, 9999)
        assert opens(local, "operator", stranger, 9999), "no policy is the operator's"
        assert opens(local, worker.name, stranger, 6379)


def _listener(plane: ControlPlane, port: int) -> socket.socket:
    return socket.create_server((plane.network.addresses["stranger"], port))


def test_rays_dashboard_wants_the_token(local: ControlPlane) -> None:
    url = f"http://{local.pods['head'].address}:8265/api/serve/applications/"
    assert local.network.inside("operator", lambda: httpx.get(url)).status_code == 401


def test_an_exporter_that_dies_comes_again(local: ControlPlane) -> None:
    worker = local.workers[0]
    exporter = worker.container("exporter")

    def images() -> float:
        url = f"http://{worker.address}:9400/metrics"
        text = local.network.inside("prometheus", lambda: httpx.get(url, timeout=10).text)
        lines = [line for line in text.splitlines() if line.startswith("fourstep_images_total{")]
        return sum(float(line.split()[-1]) for line in lines)

    local.wait(lambda: images() > 0, "a scrape with what has been drawn")
    before, starts = images(), exporter.num_starts
    exporter.signal(signal.SIGKILL)
    local.wait(lambda: exporter.num_starts == starts + 1, "the exporter's second start")
    local.wait(lambda: images() >= before, "what was counted before")
    assert all(each.running for each in worker.containers), "nothing else has noticed"


def load(plane: ControlPlane, num_clients: int) -> Load:
    """Pictures, one client's after another's, through every pod that the Service would have.

    They take so long that a client nearly always has one in hand, however fast the machine.
    """
    return Load(
        plane.ready,
        lambda name, number: ask(plane, plane.pods[name], seed=number, num_inference_steps=50),
        num_clients,
    )


def test_load_brings_a_pod_and_one_that_is_told_to_go_drains(local: ControlPlane) -> None:
    """Serve wants a second replica, Ray's autoscaler patches the cluster, a pod is there."""
    with load(local, num_clients=12) as running:
        local.wait(lambda: len(local.workers) == 2, "the autoscaler's second pod")
        local.wait(lambda: all(pod.ready for pod in local.workers), "two pods that are ready")
        first = next(iter(local.workers))
        grace_s = first.object["spec"]["terminationGracePeriodSeconds"]
        assert 0 < local.delete(first.name) < grace_s
        assert running.by_node[first.name][200], "its own proxy took some"
        local.wait(lambda: len(local.workers) == 2, "the operator's pod in its place")
        local.wait(lambda: all(pod.ready for pod in local.workers), "two pods that are ready")
    assert set(running.outcomes) == {200}, running.by_node


def test_little_load_takes_a_pod_away_and_no_request_with_it(local: ControlPlane) -> None:
    """Serve stops a replica, its node's proxy drains, the autoscaler has the idle pod deleted."""
    with load(local, num_clients=12) as before:
        local.wait(lambda: sum(pod.ready for pod in local.workers) == 2, "two pods that are ready")
        names = {"head", *(pod.name for pod in local.workers)}
        local.wait(lambda: names <= before.by_node.keys(), "pictures through every proxy")
    with load(local, num_clients=2) as running:
        local.wait(lambda: len(local.workers) == 1, "the end of a pod")
        seen = running.outcomes.total()
        local.wait(lambda: running.outcomes.total() > seen + 5, "pictures after that")
    assert set(before.outcomes + running.outcomes) == {200}, (before.by_node, running.by_node)


def test_the_head_ends_within_its_grace(local: ControlPlane) -> None:
    """The last one: nothing is left afterwards. KubeRay's autoscaler was seen to sit its out."""
    for name in list(local.pods):
        if name != "head":
            local.pods.pop(name).kill()
    head = local.pods["head"]
    head.end(without=("autoscaler",))


@pytest.mark.parametrize("name", GPU_OVERLAYS)
def test_an_overlay_for_gpus_comes_to_a_picture_on_cpus(
    image: BuiltImage, open_folder: Path, kubectl: None, name: str
) -> None:
    """Its Job fills the cache, its pods wait for it; engine, model and GPUs are replaced."""
    (open_folder / name).mkdir()
    objects = on_cpus(render(KUBERNETES / "overlays" / name))
    plane = ControlPlane(open_folder / name, image, objects, KEYS)
    try:
        plane.start()
        plane.run_job(one(objects, "Job", "fourstep-model"))
        plane.deploy()
        plane.wait(lambda: plane.workers and plane.workers[0].ready, "a worker that is ready")
        for application in plane.applications().values():
            route = application["route_prefix"].rstrip("/")
            assert picture(ask(plane, plane.workers[0], route=route)).size == (128, 128)
        if "gcsFaultToleranceOptions" in cluster(objects) and name == "gke-l4":
            assert_it_outlives_its_head(plane)
    finally:
        plane.close()


def assert_it_outlives_its_head(plane: ControlPlane) -> None:
    """The head dies at once; who asks the worker's proxy meanwhile does not notice."""
    worker = plane.workers[0]
    starts = {each.name: each.num_starts for each in worker.containers}
    plane.pods["head"].kill()
    for seed in range(10):
        picture(ask(plane, worker, seed=seed))
    plane.start_head()
    plane.wait(plane.all_run, "the same applications under another head")
    picture(ask(plane, worker, seed=99))
    plane.wait(lambda: ask(plane, plane.pods["head"], seed=99).is_success, "the next head's proxy")
    assert {each.name: each.num_starts for each in worker.containers} == starts
