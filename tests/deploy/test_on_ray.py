"""The overlays' serveConfigV2, really deployed: a cluster of two nodes, requests while it changes.

Left as they are but for what this machine cannot have: the model, the engine, the port, and delays
of minutes. A replica that asks for a GPU gets one of four that Ray is told of.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.drawing.model import prepare
from engines.order import Order
from tests.deploy.cluster import BIN, RayCluster
from tests.deploy.load import AGAIN, CLOSED, LINE, SECRET, Load
from tests.deploy.manifests import (
    environment,
    kustomize_version,
    overlay,
    replica,
    serve_config,
)
from tests.deploy.test_consistency import IMAGE_BIN

QUICK = {  # Ray measures every 10 s otherwise; and two GPUs for three replicas make a drain last
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "60",
    "RAY_prestart_worker_first_driver": "0",  # else eight idle processes a node, at once
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
PATIENT = {"request_timeout_s": 3600}  # a busy machine would call a long one hopeless
SOON = {
    "upscale_delay_s": 1,
    "downscale_delay_s": 2,
    "look_back_period_s": 11,
}


@pytest.fixture(scope="module")
def cluster(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RayCluster]:
    if kustomize_version() < 5:
        pytest.skip("kubectl 1.27 or newer is needed (kustomize 5); Debian's 1.20 is too old")
    prepare(Order(str(lcm_checkpoint), "onnxruntime", cache_dir=cache_dir), lambda *_: None)
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "api-keys").write_text(f"{LINE}\n")
    here = {"/etc/fourstep/keys": folder, "/var/cache/fourstep": cache_dir, IMAGE_BIN: BIN}
    values = environment(overlay("local-cpu"))
    for there, path in here.items():
        values = {name: value.replace(there, str(path)) for name, value in values.items()}
    running = RayCluster(folder, values | QUICK, gpus_per_node=2)
    try:
        running.start()
        yield running
    finally:
        running.close()


def config_of(cluster: RayCluster, name: str, model: Path, **changes: Any) -> dict[str, Any]:
    """An overlay's serveConfigV2 with another port and model, TensorRT's engine left to `auto`."""
    config = serve_config(overlay(name))
    config["http_options"]["port"] = cluster.ports["head"]
    for application in config["applications"]:
        arguments = application["args"]
        if arguments.get("engine") == "tensorrt-rtx":
            arguments["engine"] = "auto"
        arguments |= {"model": str(model), "num_threads": 1, **PATIENT} | changes
    return config


class Endpoints:
    """The nodes' proxies that a Service would have: those whose pod passes its readiness probe.

    The worker's is asked as the manifest says; the head is there as long as it answers, as the
    operator sees to it.
    """

    def __init__(self, cluster: RayCluster) -> None:
        self._ports = cluster.ports
        probe = replica(overlay("gke-l4"))["containers"][0]["readinessProbe"]
        self._path = probe["httpGet"]["path"]
        self._period_s, self._timeout_s = probe["periodSeconds"], probe["timeoutSeconds"]
        self._ready = {"head"}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def ready(self) -> list[str]:
        return list(self._ready)

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            url = f"http://127.0.0.1:{self._ports['worker']}{self._path}"
            try:
                passes = httpx.get(url, timeout=self._timeout_s).is_success
            except httpx.HTTPError:
                passes = False
            self._ready = {"head", "worker"} if passes else {"head"}

    def __enter__(self) -> Endpoints:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def load_on(cluster: RayCluster, num_clients: int, num_steps: int) -> Iterator[Load]:
    """Clients that draw through any proxy that the Service would have."""
    body = {"prompt": "a red star", "num_inference_steps": num_steps}
    # Each request connects anew, as of many clients: a kept connection would stay with a proxy that
    # the Service has long forgotten.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    headers = {"Authorization": f"Bearer {SECRET}"}
    with (
        httpx.Client(headers=headers, timeout=200, limits=limits) as client,
        Endpoints(cluster) as endpoints,
    ):

        def ask(node: str, _: int) -> httpx.Response:
            url = f"http://127.0.0.1:{cluster.ports[node]}/v1/images/generations"
            return client.post(url, json=body)

        with Load(endpoints.ready, ask, num_clients) as load:
            yield load


def has_worker(load: Load) -> bool:
    return "worker" in load.ready()


def test_local_cpu_is_deployed_and_changed_without_a_failed_request(
    cluster: RayCluster, lcm_checkpoint: Path
) -> None:
    cluster.deploy(config_of(cluster, "local-cpu", lcm_checkpoint))
    for name, port in cluster.agent_ports.items():  # what the probes ask; they have no token
        assert httpx.get(f"http://127.0.0.1:{port}/api/healthz", timeout=120).is_success, name
    base = f"http://127.0.0.1:{cluster.ports['head']}"
    assert httpx.get(f"{base}/readyz", timeout=120).status_code == 200
    body = {"prompt": "a red star"}
    assert httpx.post(f"{base}/v1/images/generations", json=body, timeout=120).status_code == 401
    (before,) = cluster.replicas()
    with load_on(cluster, num_clients=2, num_steps=4) as load:
        cluster.wait(lambda: load.outcomes.total() > 5, "images before the change")
        cluster.deploy(config_of(cluster, "local-cpu", lcm_checkpoint, png_level=2))
        cluster.wait(lambda: before not in cluster.replicas(state=""), "the old replica's end")
        seen = load.outcomes.total()
        cluster.wait(lambda: load.outcomes.total() > seen + 5, "images after the change")
        assert cluster.replicas()
    assert set(load.outcomes) == {200}, load.outcomes
    logs = cluster.log("head") + cluster.log("worker")
    assert '"path": "/v1/images/generations"' in logs, "the access log is the pods' output"


def test_gke_l4_goes_from_one_replica_to_three_and_back(
    cluster: RayCluster, lcm_checkpoint: Path
) -> None:
    config = config_of(cluster, "gke-l4", lcm_checkpoint, max_replicas=3, **SOON)
    cluster.deploy(config)
    cluster.wait(lambda: len(cluster.replicas(state="")) == 1, "the old replica's end")
    (target,) = (
        each["deployment_config"]["autoscaling_config"]["target_ongoing_requests"]
        for each in cluster.applications()["fourstep"]["deployments"].values()
    )
    assert target == config["applications"][0]["args"]["max_batch"]
    with load_on(cluster, num_clients=3 * int(target), num_steps=50) as load:
        cluster.wait(lambda: len(cluster.replicas()) == 3, "three replicas")
        assert len(set(cluster.replicas().values())) == 2, "two GPUs a node: both must be in use"
        cluster.wait(lambda: has_worker(load), "a worker that takes requests")
    # A little load keeps one, on the head: the other node's proxy drains, and its port closes.
    with load_on(cluster, num_clients=2, num_steps=4) as least:
        cluster.wait(lambda: refuses(cluster.ports["worker"]), "the end of the worker's proxy")
        cluster.wait(lambda: len(cluster.replicas(state="")) == 1, "the one replica that is left")
        seen = least.outcomes.total()
        cluster.wait(lambda: least.outcomes.total() > seen + 5, "images after that")
    assert set(load.outcomes + least.outcomes) == {200}, (load.outcomes, least.outcomes)


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return False


def test_without_load_no_replica_is_left_and_a_request_brings_one_back(
    cluster: RayCluster, lcm_checkpoint: Path
) -> None:
    idle = {"min_replicas": 0, "downscale_to_zero_delay_s": 1}
    cluster.deploy(config_of(cluster, "gke-l4", lcm_checkpoint, max_replicas=3, **SOON, **idle))
    cluster.wait(lambda: not cluster.replicas(state=""), "no replica")
    routes = f"http://127.0.0.1:{cluster.ports['head']}/-/routes"
    # Ray says RUNNING before its proxies know of it; until then the answer is to ask again.
    cluster.wait(lambda: '"/"' in httpx.get(routes).text, "a proxy that knows where to send it")
    with load_on(cluster, num_clients=1, num_steps=4) as load:
        cluster.wait(lambda: load.outcomes.total() > 0, "an image")
    assert set(load.outcomes) == {200}, load.outcomes


@pytest.mark.parametrize("end", [RayCluster.kill_node, RayCluster.end_node], ids=["dies", "goes"])
def test_a_node_takes_no_request_with_it_but_what_its_own_proxy_had_where_it_dies(
    cluster: RayCluster, lcm_checkpoint: Path, end: Callable[[RayCluster, str], None]
) -> None:
    cluster.start_worker()
    cluster.deploy(config_of(cluster, "gke-l4", lcm_checkpoint, max_replicas=3, **SOON))
    with load_on(cluster, num_clients=24, num_steps=50) as load:
        cluster.wait(lambda: len(cluster.replicas()) == 3, "replicas on both nodes")
        cluster.wait(lambda: has_worker(load), "a worker that takes requests")
        end(cluster, "worker")
        seen = load.outcomes.total()
        cluster.wait(lambda: load.outcomes.total() > seen + 24, "images without that node")
        cluster.wait(lambda: load.by_node["head"].total() > 240, "images enough to judge by")
    if end is RayCluster.end_node:
        assert set(load.outcomes) == {200}, load.by_node
    # Its own proxy's are cut. The other one has another replica draw what the dead ones had in
    # hand; once in a while it says that the client is to ask again, by words or by closing.
    head = load.by_node["head"]
    assert set(head) <= {200, AGAIN, CLOSED}, load.by_node
    assert head[200] > 0.9 * head.total(), load.by_node


def test_a_new_cluster_begins_with_as_many_replicas_as_the_old_one_had(
    cluster: RayCluster, lcm_checkpoint: Path
) -> None:
    """KubeRay moves the traffic when the applications run: that must not be at the minimum."""
    cluster.start_worker()
    config = config_of(cluster, "gke-l4", lcm_checkpoint, max_replicas=3, initial_replicas=3)
    (application,) = config["applications"]
    assert application["args"]["min_replicas"] == 1
    application["name"] = "green"  # on this cluster as new as in a new one
    cluster.deploy(config)
    assert len(cluster.replicas("green")) == 3, "when it is first said to run"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eks-a10g", "aks-a100", "multi-model"])
def test_every_application_of_an_overlay_draws(
    cluster: RayCluster, lcm_checkpoint: Path, name: str
) -> None:
    """The others are above. Not theirs: model, port, one thread, TensorRT, a GPU that is one."""
    cluster.start_worker()
    config = config_of(cluster, name, lcm_checkpoint)
    cluster.deploy(config)
    for application in config["applications"]:
        route = application["route_prefix"].rstrip("/")
        url = f"http://127.0.0.1:{cluster.ports['head']}{route}"
        headers = {"Authorization": f"Bearer {SECRET}"}
        body = {"prompt": "a red star", "response_format": "b64_json"}
        answer = httpx.post(f"{url}/v1/images/generations", json=body, headers=headers, timeout=200)
        assert answer.status_code == 200, (application["name"], answer.text)
        assert answer.json()["model"] == application["args"].get("model_id", lcm_checkpoint.name)
        assert len(cluster.replicas(application["name"])) == 1
