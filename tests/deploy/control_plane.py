"""What stands for Kubernetes and for KubeRay around pods that are run by hand.

Of the operator what makes a Ray cluster serve: a head, as many workers as the cluster's object
says, its Serve config. What Ray's autoscaler asks of Kubernetes is in `api_server.py`.
"""

from __future__ import annotations

import copy
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deploy.api_server import api_server, make_certificate
from tests.deploy.built_image import BuiltImage
from tests.deploy.kubelet import Cluster, Pod
from tests.deploy.kuberay import (
    CLUSTER,
    HEAD_SERVICE,
    OPERATOR_LABELS,
    Object,
    head_pod,
    worker_pod,
)
from tests.deploy.manifests import one
from tests.deploy.pod_network import PodNetwork

STRANGER = {"namespace": "default", "labels": {"app.kubernetes.io/name": "somebody"}}
PROMETHEUS = {"namespace": "monitoring", "labels": {"app.kubernetes.io/name": "prometheus"}}
OPERATOR = {"namespace": "kuberay-system", "labels": OPERATOR_LABELS[0]}
DEADLINE_S = 900  # a machine that others use
TICK_S = 0.5
MAX_PUTS = 10


class ControlPlane:
    """Runs a rendered overlay's Ray cluster until `close`."""

    def __init__(
        self, folder: Path, image: BuiltImage, objects: list[Object], keys: dict[str, str]
    ) -> None:
        self._service = one(objects, "RayService")
        self.token = secrets.token_hex(32)
        self._account_token = secrets.token_hex(16)
        policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
        self.network = PodNetwork(policies)
        certificate, key = make_certificate(folder, self.network.api_server)
        self.cluster = Cluster(
            folder, image, self.network,
            config_maps={
                each["metadata"]["name"]: each["data"]
                for each in objects if each["kind"] == "ConfigMap"
            },
            secrets={
                "fourstep-keys": keys, CLUSTER: {"auth_token": self.token},
                "fourstep-redis": {"redis-password": secrets.token_hex(16)},
            },
            account={"token": self._account_token, "ca.crt": certificate.read_text(),
                     "namespace": "fourstep"},
        )  # fmt: skip
        for name, metadata in (("stranger", STRANGER), ("prometheus", PROMETHEUS),
                               ("operator", OPERATOR)):  # fmt: skip
            self.network.add(name, metadata)
        self._redis = self._start_redis(folder)
        self.ray_cluster = self._ray_cluster()
        self.pods: dict[str, Pod] = {}
        self._going: set[str] = set()
        self._number = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._api = api_server(self, certificate, key)
        self._threads = [
            threading.Thread(target=self._api.serve_forever),
            threading.Thread(target=self._reconcile),
        ]

    @property
    def workers(self) -> list[Pod]:
        return [pod for name, pod in list(self.pods.items()) if name != "head"]

    def ready(self) -> list[str]:
        """The pods that the Service would have: the head, not being excluded, and ready ones."""
        return ["head", *(pod.name for pod in self.workers if pod.ready)]

    def start(self) -> None:
        """The head, then its workers; returns when the head's containers have started."""
        self._threads[0].start()
        self.start_head()
        self._threads[1].start()

    def start_head(self) -> None:
        """A head, or the next one; its Service has the same name."""
        head = head_pod(self._service)
        address = self.network.add(head["metadata"]["name"], head["metadata"])
        for name in (HEAD_SERVICE, HEAD_SERVICE.partition(".")[0]):
            self.cluster.hosts[name] = address
        self.cluster.hosts["kubernetes.default"] = self.network.api_server
        self.cluster.hosts["fourstep-redis"] = self.network.redis
        self.pods["head"] = Pod(self.cluster, head)
        self.pods["head"].start()

    def deploy(self) -> None:
        """As the operator: put the Serve config to the dashboard, wait until all of it runs."""
        config = yaml.safe_load(self._service["spec"]["serveConfigV2"])
        self.wait(lambda: self.applications() == {}, "a dashboard")
        answers: list[httpx.Response] = []

        def put() -> bool:  # once more where Serve was not up yet, as the operator does
            answers.append(
                self._dashboard(
                    lambda client, url: client.put(f"{url}/api/serve/applications/", json=config)
                )
            )
            assert answers[-1].is_success or len(answers) < MAX_PUTS, answers[-1].text
            return answers[-1].is_success

        self.wait(put, "a dashboard that takes the configuration")
        self.wait(self.all_run, "every application running")

    def all_run(self) -> bool:
        """Whether every application is said to be running."""
        applications = self.applications()
        states = {name: each["status"] for name, each in applications.items()}
        assert "DEPLOY_FAILED" not in states.values(), applications
        return bool(states) and set(states.values()) == {"RUNNING"}

    def applications(self) -> dict[str, Any]:
        answer = self._dashboard(lambda client, url: client.get(f"{url}/api/serve/applications/"))
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["applications"]
        return found

    def _dashboard(self, ask: Callable[[httpx.Client, str], httpx.Response]) -> httpx.Response:
        def work() -> httpx.Response:
            headers = {"Authorization": f"Bearer {self.token}"}
            with httpx.Client(headers=headers, timeout=30) as client:
                return ask(client, f"http://{self.pods['head'].address}:8265")

        return self.network.inside("operator", work)

    def wait(self, condition: Callable[[], object], what: str) -> float:
        """Until it holds; returns the seconds that it took."""
        begin = time.monotonic()
        while True:
            try:
                if condition():
                    return time.monotonic() - begin
            except httpx.HTTPError:
                pass
            for pod in list(self.pods.values()):
                assert not pod.failure, f"{pod.name}: {pod.failure}\n{pod.logs()}"
            late = time.monotonic() - begin > DEADLINE_S
            assert not late, "\n".join([f"no {what}", *(p.logs() for p in self.pods.values())])
            time.sleep(TICK_S)

    def run_job(self, job: Object) -> None:
        """To its end, as the pod that Kubernetes makes of it.

        Raises:
            AssertionError: it ended with another code than 0.
        """
        template = copy.deepcopy(job["spec"]["template"])
        metadata = template["metadata"] | {"name": job["metadata"]["name"], "namespace": "fourstep"}
        pod = Pod(self.cluster, template | {"metadata": metadata})
        (container,) = pod.containers
        pod.start()
        try:
            self.wait(lambda: container.code is not None, "end of the Job")
            assert container.code == 0, pod.logs()
        finally:
            pod.kill()

    def close(self) -> None:
        self._stop.set()
        for name in self._going & self.pods.keys():  # nobody waits for their grace any more
            for container in self.pods[name].containers:
                container.signal(signal.SIGKILL)
        self._api.shutdown()
        for thread in self._threads:
            if thread.ident:
                thread.join()
        self._api.server_close()
        for pod in self.pods.values():
            pod.kill()
        if self._redis:
            self._redis.terminate()
            self._redis.wait()
        self.network.close()

    def _start_redis(self, folder: Path) -> subprocess.Popen[bytes] | None:
        """As the component's container starts it; the program is this machine's own."""
        if "gcsFaultToleranceOptions" not in self._service["spec"]["rayClusterConfig"]:
            return None
        password = self.cluster.secrets["fourstep-redis"]["redis-password"]
        command = [
            "redis-server",
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
            "--dir",
            folder,
        ]
        command += [
            "--requirepass",
            password,
            "--bind",
            self.network.redis,
            "--logfile",
            "redis.log",
        ]
        return subprocess.Popen(command)

    def _ray_cluster(self) -> Object:
        """The object that KubeRay makes of the service, with what it fills in."""
        spec = copy.deepcopy(self._service["spec"]["rayClusterConfig"])
        for group in spec["workerGroupSpecs"]:
            group |= {"replicas": group["minReplicas"], "numOfHosts": 1}
        metadata = {"name": CLUSTER, "namespace": "fourstep", "resourceVersion": "1"}
        return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}

    def _reconcile(self) -> None:
        """KubeRay's part: pods as the cluster's object has them."""
        while not self._stop.wait(TICK_S):
            with self._lock:
                (group,) = self.ray_cluster["spec"]["workerGroupSpecs"]
                leaving = group.get("scaleStrategy", {}).get("workersToDelete", [])
                wanted = max(group["replicas"], group["minReplicas"])
            ended = [pod.name for pod in self.workers if pod.containers[0].code is not None]
            for name in (*leaving, *ended):
                self.delete(name)
            for _ in range(wanted - len(self.workers)):
                self.add_worker(group)

    def delete(self, name: str) -> float:
        """As `kubectl delete pod`: the seconds that its end took; 0 where it goes already."""
        with self._lock:
            if name not in self.pods or name in self._going:
                return 0.0
            self._going.add(name)
        seconds = self.pods[name].end()
        del self.pods[name]
        return seconds

    def add_worker(self, group: Object) -> Pod:
        made = worker_pod(self._service, group)
        self._number += 1
        made["metadata"]["name"] += f"-{self._number}"
        pod = Pod(self.cluster, made)
        pod.start()
        self.pods[pod.name] = pod
        return pod

    # What the autoscaler asks of the API server.

    def listed(self) -> Object:
        items = []
        for pod in list(self.pods.values()):
            state: Object = {"running": {}} if pod.running else {"waiting": {}}
            status = {"podIP": pod.address, "phase": "Running" if pod.running else "Pending",
                      "containerStatuses": [{"name": "ray", "state": state}]}  # fmt: skip
            metadata = pod.object["metadata"] | {"resourceVersion": "1"}
            if pod.name in self._going:
                metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            items.append(pod.object | {"metadata": metadata, "status": status})
        return {"kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": items}

    def patch(self, operations: list[Object]) -> Object:
        """JSON Patch of the Ray cluster, of the operations that the autoscaler uses."""
        with self._lock:
            for each in operations:
                assert each["op"] in ("replace", "add"), each
                place: Any = self.ray_cluster
                *way, last = each["path"].strip("/").split("/")
                for key in way:
                    place = (
                        place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
                    )
                place[last] = each["value"]
            return copy.deepcopy(self.ray_cluster)

    def allows(self, authorization: str | None) -> bool:
        return authorization == f"Bearer {self._account_token}"
