"""A pod as a kubelet runs it: volumes, init containers and sidecars in order, probes, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.built_image import USER, BuiltImage
from tests.deploy.container import PATIENCE, Container
from tests.deploy.kuberay import Object
from tests.deploy.pod_network import PodNetwork
from tests.deploy.probes import Probes

TICK_S = 0.2
ENDPOINTS_S = 2.0  # until a pod that has got SIGTERM is no Service's any more, at every node
ACCOUNT = "/run/secrets/kubernetes.io/serviceaccount"  # /var/run is a link to /run
QUANTITIES = {"Mi": 1 << 20, "Gi": 1 << 30}


@dataclass(frozen=True)
class Cluster:
    """What pods find around them: objects by kind and name, shared volumes, names of hosts."""

    folder: Path
    image: BuiltImage
    network: PodNetwork
    config_maps: dict[str, dict[str, str]]
    secrets: dict[str, dict[str, str]]
    account: dict[str, str]  # of the service account's folder
    hosts: dict[str, str] = field(default_factory=dict)  # name → address


class Pod:
    """Runs from `start` to `end`; ``ready`` and ``running`` are its state."""

    def __init__(self, cluster: Cluster, pod: Object) -> None:
        self.name, self.object = pod["metadata"]["name"], pod
        self.ready = False
        self.failure = ""
        self._cluster, self._spec = cluster, pod["spec"]
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=cluster.folder))
        self._folder.chmod(0o755)
        self._mounted: list[Path] = []
        self.address = cluster.network.add(self.name, pod["metadata"])
        kinds = ("initContainers", "containers")
        self._init, self.containers = (
            [self._container(spec) for spec in self._spec.get(kind, [])] for kind in kinds
        )
        self._probes = {id(each): Probes(each.spec, self.address) for each in self._all}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._live, name=self.name)

    @property
    def _all(self) -> list[Container]:
        return [*self._init, *self.containers]

    def container(self, name: str) -> Container:
        (found,) = [each for each in self._all if each.name == name]
        return found

    @property
    def running(self) -> bool:
        return any(each.running for each in self.containers)

    def start(self) -> None:
        self._thread.start()

    def end(self, without: tuple[str, ...] = ()) -> float:
        """As when the pod is deleted; returns the seconds that its containers took to end.

        It is a Service's for `ENDPOINTS_S` more: SIGTERM is first, and endpoints take a while.

        Raises:
            AssertionError: one, not of ``without``, was still there when its grace was over.
        """
        begin, grace_s = time.monotonic(), self._spec["terminationGracePeriodSeconds"]
        self._ending.set()
        self._thread.join()
        threading.Timer(ENDPOINTS_S, self._forget).start()
        late = _end(self.containers, begin + grace_s)
        late = [name for name in late if name not in without]
        seconds = time.monotonic() - begin  # sidecars go when what they are beside has gone
        late += _end(self._init, max(begin + grace_s, time.monotonic() + 2))
        self._release()
        assert not late, f"{late} of {self.name} had to be killed after {grace_s} s"
        return seconds

    def _forget(self) -> None:
        self.ready = False

    def kill(self) -> None:
        """All at once, whatever state it is in."""
        self._ending.set()
        if self._thread.ident:
            self._thread.join()
        for each in self._all:
            each.signal(signal.SIGKILL)
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                each.wait(10)
        self._release()

    def _release(self) -> None:
        for mounted in reversed(self._mounted):
            subprocess.run(["umount", "--lazy", mounted], capture_output=True)
        self._mounted.clear()

    def _live(self) -> None:
        try:
            for each in self._init:
                if not self._begin(each):
                    return
            for each in self.containers:
                each.start()
            while not self._ending.wait(TICK_S):
                self._look()
        except Exception as error:  # the test's to see
            self.failure = repr(error)
            raise

    def _begin(self, container: Container) -> bool:
        """Start an init container; True when the next may start."""
        container.start()
        probes = self._probes[id(container)]
        while not self._ending.wait(TICK_S):
            if container.is_sidecar:
                if not container.running:
                    container.start()
                if probes.started():
                    return True
            elif container.code is not None:
                self.failure = f"{container.name} ended with {container.code}"
                if container.code == 0:
                    self.failure = ""
                return container.code == 0
        return False

    def _look(self) -> None:
        for each in self._all:
            probes = self._probes[id(each)]
            if each.is_sidecar and not each.running:
                each.start()
            if each.running and probes.started() and not probes.alive():
                self.failure = f"{each.name} failed its liveness probe"
                each.signal(signal.SIGKILL)
        self.ready = all(
            each.running and self._probes[id(each)].ready() for each in self.containers
        )

    def _container(self, spec: Object) -> Container:
        mounts = {
            each["mountPath"]: (self._volume(each["name"]), each.get("readOnly", False))
            for each in sorted(spec.get("volumeMounts", []), key=lambda each: each["mountPath"])
        }
        for path in mounts:  # a mount in a mount: its place is made in the outer one
            for outer, (here, _) in mounts.items():
                if path.startswith(f"{outer}/"):
                    (here / path.removeprefix(f"{outer}/")).mkdir(parents=True, exist_ok=True)
        if self._spec.get("automountServiceAccountToken"):
            mounts[ACCOUNT] = (self._files("account", self._cluster.account, 0o444), True)
        mounts["/etc/hosts"] = (self._hosts(), True)
        name_service = self._files("dns", {"resolv.conf": ""}, 0o444)
        mounts["/etc/resolv.conf"] = (name_service / "resolv.conf", True)
        return Container(
            self._cluster.image, spec, network=self._cluster.network.path(self.name),
            host_name=self.name, log=self._folder / f"{spec['name']}.log",
            environment=self._environment(spec), mounts=mounts,
        )  # fmt: skip

    def _environment(self, spec: Object) -> dict[str, str]:
        cluster = self._cluster
        values = {
            "KUBERNETES_SERVICE_HOST": cluster.network.api_server,
            "KUBERNETES_SERVICE_PORT": "443",
            "KUBERNETES_SERVICE_PORT_HTTPS": "443",
        } | PATIENCE
        for source in spec.get("envFrom", []):
            values |= cluster.config_maps[source["configMapRef"]["name"]]
        for each in spec.get("env", []):
            source = each.get("valueFrom", {})
            if reference := source.get("secretKeyRef"):
                values[each["name"]] = cluster.secrets[reference["name"]][reference["key"]]
            elif reference := source.get("fieldRef"):
                values[each["name"]] = _field(self.object, reference["fieldPath"])
            else:
                values[each["name"]] = each.get("value", "")
        return values

    def _volume(self, name: str) -> Path:
        (volume,) = [each for each in self._spec["volumes"] if each["name"] == name]
        if reference := volume.get("secret"):
            files = self._cluster.secrets[reference["secretName"]]
            return self._files(name, files, reference.get("defaultMode", 0o644))
        if reference := volume.get("configMap"):
            data = self._cluster.config_maps[reference["name"]]
            files = {each["path"]: data[each["key"]] for each in reference["items"]}
            return self._files(name, files, reference.get("defaultMode", 0o644))
        if reference := volume.get("persistentVolumeClaim"):
            shared = self._cluster.folder / f"claim-{reference['claimName']}"
            shared.mkdir(exist_ok=True)
            os.chown(shared, USER, USER)
            return shared
        return self._empty_dir(name, volume["emptyDir"])

    def _empty_dir(self, name: str, empty_dir: Object) -> Path:
        folder = self._folder / "volumes" / name
        if folder.exists():
            return folder
        folder.mkdir(parents=True)
        if empty_dir.get("medium") == "Memory":
            limit = empty_dir.get("sizeLimit", "1Gi")
            size = int(limit[:-2]) * QUANTITIES[limit[-2:]]
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True
            )
            self._mounted.append(folder)
        folder.chmod(0o777)
        return folder

    def _files(self, name: str, files: dict[str, str], mode: int) -> Path:
        """A folder of files that the pod's group may read."""
        folder = self._folder / "volumes" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text)
            (folder / file).chmod(mode)
            os.chown(folder / file, 0, USER)
        return folder

    def _hosts(self) -> Path:
        lines = [f"127.0.0.1 localhost\n{self.address} {self.name}"]
        lines += [f"{address} {name}" for name, address in self._cluster.hosts.items()]
        return self._files("hosts", {"hosts": "\n".join(lines) + "\n"}, 0o444) / "hosts"

    def logs(self) -> str:
        """The last words of each of its containers."""
        return "\n".join(f"--- {each.name}\n{each.said()[-3000:]}" for each in self._all)


def _end(containers: list[Container], deadline: float) -> list[str]:
    """SIGTERM to all, SIGKILL to those that are left at the deadline, who are named."""
    late = []
    for each in containers:
        each.signal(signal.SIGTERM)
    for each in (one for one in containers if one.num_starts):
        try:
            each.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late.append(each.name)
            each.signal(signal.SIGKILL)
            each.wait(10)
    return late


def _field(pod: Object, path: str) -> str:
    if path.startswith("metadata.labels['"):
        return str(pod["metadata"]["labels"][path.split("'")[1]])
    return str({"metadata.name": pod["metadata"]["name"]}[path])
