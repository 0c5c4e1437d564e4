"""A container's startup, liveness and readiness probes, asked as a kubelet asks them."""

from __future__ import annotations

import contextlib
import time
from collections import Counter

import httpx

from tests.deploy.kuberay import Object


class Probes:
    """A container's probes, each asked when its period has passed."""

    def __init__(self, spec: Object, address: str) -> None:
        self._address = address
        self._specs = {
            kind: spec[f"{kind}Probe"]
            for kind in ("startup", "liveness", "readiness")
            if f"{kind}Probe" in spec
        }
        self._since = time.monotonic()
        self._asked: dict[str, float] = {}
        self._failures: Counter[str] = Counter()
        self._passed: set[str] = set()

    def started(self) -> bool:
        return "startup" not in self._specs or "startup" in self._passed or self._ask("startup")

    def alive(self) -> bool:
        if "liveness" not in self._specs:
            return True
        self._ask("liveness")
        return self._failures["liveness"] < self._limit("liveness")

    def ready(self) -> bool:
        """Not before the first success; afterwards until as many failures as are allowed."""
        if "readiness" not in self._specs:
            return True
        self._ask("readiness")
        return "readiness" in self._passed and self._failures["readiness"] < self._limit(
            "readiness"
        )

    def _limit(self, kind: str) -> int:
        return int(self._specs[kind].get("failureThreshold", 3))

    def _ask(self, kind: str) -> bool:
        spec, now = self._specs[kind], time.monotonic()
        if now - self._since < spec.get("initialDelaySeconds", 0):
            return False
        if now - self._asked.get(kind, 0) < spec.get("periodSeconds", 10):
            return False
        self._asked[kind] = now
        asked = spec["httpGet"]
        url = f"http://{self._address}:{asked['port']}{asked['path']}"
        passes = False
        with contextlib.suppress(httpx.HTTPError):
            passes = httpx.get(url, timeout=spec.get("timeoutSeconds", 1)).status_code < 400
        self._failures[kind] = 0 if passes else self._failures[kind] + 1
        if passes:
            self._passed.add(kind)
        elif self._failures[kind] >= self._limit(kind):
            self._passed.discard(kind)
        return passes
