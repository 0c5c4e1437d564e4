"""Addresses for pods: a network namespace each, on a bridge, behind rules made of NetworkPolicies.

The machine itself is the node: it reaches its pods always, as a kubelet does.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.deploy.kuberay import Object, selects

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
T = TypeVar("T")
_NETWORKS = itertools.count()  # of this process: a later one may come before the first has closed


class PodNetwork:
    """Pods by name; `close` takes all of it away again."""

    def __init__(self, policies: list[Object]) -> None:
        self._policies = policies
        number = (8 * os.getpid() + next(_NETWORKS)) % 250
        self._prefix = f"fs{os.getpid() % 10000}n{number}"
        self._subnet = f"10.231.{number}"
        self.node = f"{self._subnet}.1"
        self.api_server, self.redis = f"{self._subnet}.2", f"{self._subnet}.3"
        self.metadata: dict[str, Object] = {}  # pod → its metadata, in order of its address
        self.addresses: dict[str, str] = {}
        _run("ip", "link", "add", self._prefix, "type", "bridge")
        for address in (self.node, self.api_server, self.redis):
            _run("ip", "address", "add", f"{address}/24", "dev", self._prefix)
        _run("ip", "link", "set", self._prefix, "up")

    def path(self, name: str) -> Path:
        """What `nsenter --net` wants."""
        return Path("/run/netns") / f"{self._prefix}-{name}"

    def add(self, name: str, metadata: Object) -> str:
        """An address for a pod, or the one that it has; every pod's rules are made anew."""
        if name in self.addresses:
            return self.addresses[name]
        number = 10 + len(self.addresses)
        here, there = f"{self._prefix}h{number}", f"{self._prefix}p{number}"
        space = self.path(name).name
        address = self.addresses[name] = f"{self._subnet}.{number}"
        self.metadata[name] = metadata
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", space)
        _run("ip", "link", "set", here, "master", self._prefix, "up")
        inside = ("ip", "-netns", space)
        _run(*inside, "link", "set", there, "name", "eth0")
        _run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run(*inside, "link", "set", device, "up")
        for each in self.addresses:
            self._restrict(each)
        return address

    def inside(self, name: str, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises, done by a thread in a pod's namespace."""
        outcome: list[T] = []
        failure: list[BaseException] = []

        def enter() -> None:
            try:
                with self.path(name).open() as space:
                    libc = ctypes.CDLL(None, use_errno=True)
                    assert libc.setns(space.fileno(), CLONE_NEWNET) == 0, ctypes.get_errno()
                outcome.append(work())
            except BaseException as error:  # the caller's to see
                failure.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]

    def close(self) -> None:
        for name in self.addresses:
            subprocess.run(["ip", "netns", "del", self.path(name).name], capture_output=True)
        with contextlib.suppress(AssertionError):
            _run("ip", "link", "del", self._prefix)

    def _restrict(self, name: str) -> None:
        labels, namespace = self.metadata[name]["labels"], self.metadata[name]["namespace"]
        mine = [
            policy["spec"]
            for policy in self._policies
            if policy["metadata"]["namespace"] == namespace
            and selects(policy["spec"]["podSelector"], labels)
        ]
        lines = ["flush ruleset", "table inet pod {"]
        for kind, hook, device, side, peers in (
            ("Ingress", "input", "iifname", "saddr", "from"),
            ("Egress", "output", "oifname", "daddr", "to"),
        ):
            of_kind = [policy for policy in mine if kind in policy["policyTypes"]]
            fate = "drop" if of_kind else "accept"  # no policy, no isolation
            lines += [
                f"chain {hook} {{ type filter hook {hook} priority 0; policy {fate};",
                f'{device} "lo" accept',
                "ct state established,related accept",
                "meta l4proto { icmp, ipv6-icmp } accept",
                f"ip {side} {self.node} accept",
            ]
            for policy in of_kind:
                for rule in policy[kind.lower()]:
                    lines += self._rule(rule, side, rule.get(peers))
            lines.append("}")
        lines.append("}")
        text = "\n".join(lines)
        command = ["ip", "netns", "exec", self.path(name).name, "nft", "-f", "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + text

    def _rule(self, rule: Object, side: str, peers: list[Object] | None) -> list[str]:
        who = ""
        if peers is not None:
            addresses = [
                self.addresses[name]
                for name, metadata in self.metadata.items()
                if any(_is_peer(peer, metadata) for peer in peers)
            ]
            if not addresses:
                return []
            who = f"ip {side} {{ {', '.join(addresses)} }} "
        ports = rule.get("ports")
        if ports is None:
            return [f"{who}accept"]
        return [f"{who}{each['protocol'].lower()} dport {each['port']} accept" for each in ports]


def _is_peer(peer: Object, metadata: Object) -> bool:
    """Whether a policy's peer is this pod; without a namespace it is of the policy's own."""
    namespace = {"kubernetes.io/metadata.name": metadata["namespace"]}
    selector: Any = peer.get("namespaceSelector", {"matchLabels": {**_OURS}})
    return selects(selector, namespace) and selects(peer.get("podSelector", {}), metadata["labels"])


_OURS = {"kubernetes.io/metadata.name": "fourstep"}


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
