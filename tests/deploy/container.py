"""One container of a pod: bubblewrap around the image's root, as the image's user.

Its root is read-only, its processes and its host name are its own; no capability, no way to gain
one. What it is told to run is its first process, so that a signal meets what it would in a cluster.
(Not made: seccomp's profile, the limits of CPU and memory, which want a cgroup, and more open files
than this machine allows.)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import IO

from tests.deploy.built_image import USER, BuiltImage
from tests.deploy.kuberay import Object

# Not a kubelet's: on a machine that others use a node takes longer than Ray's 30 s to start.
PATIENCE = {"RAY_raylet_start_wait_time_s": "240"}
TOOLS = ("bwrap", "nsenter", "setpriv", "nft", "ip")


class Container:
    """A process that may be started again; ``num_starts`` counts."""

    def __init__(
        self, image: BuiltImage, spec: Object, *, network: Path, host_name: str, log: Path,
        environment: dict[str, str], mounts: dict[str, tuple[Path, bool]],
    ) -> None:  # fmt: skip
        """``mounts``: path in the container → path here, and whether it is read-only."""
        self.name, self.spec, self.log = spec["name"], spec, log
        self.is_sidecar = spec.get("restartPolicy") == "Always"
        self.num_starts = 0
        self._pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._status: IO[str] | None = None
        security = spec["securityContext"]
        assert security["readOnlyRootFilesystem"], self.name
        assert security["capabilities"] == {"drop": ["ALL"]}, self.name
        # The runtime makes mount points in a layer of its own: here in our copy of the image.
        for path in mounts:
            place = image.root / path.removeprefix("/")
            if not place.exists():
                place.touch() if mounts[path][0].is_file() else place.mkdir(parents=True)
        self._environment = image.environment | environment
        command = spec.get("command", image.config["Entrypoint"])
        arguments = spec.get("args", [] if "command" in spec else image.config["Cmd"])
        self._command = [
            _tool("nsenter"), f"--net={network}",
            _tool("setpriv"), f"--reuid={USER}", f"--regid={USER}", f"--groups={USER}",
            _tool("bwrap"), "--unshare-user", "--unshare-pid", "--as-pid-1", "--unshare-ipc",
            "--unshare-uts", "--hostname", host_name, "--cap-drop", "ALL",
            "--ro-bind", str(image.root), "/", "--proc", "/proc", "--dev", "/dev",
            "--ro-bind", "/sys", "/sys",
        ]  # fmt: skip
        for path, (here, read_only) in sorted(mounts.items()):  # parents come first
            self._command += ["--ro-bind" if read_only else "--bind", str(here), path]
        self._command += ["--chdir", image.config["WorkingDir"]]
        self._words = [_expanded(word, self._environment) for word in [*command, *arguments]]

    def start(self) -> None:
        self.num_starts += 1
        reader, writer = os.pipe()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "--json-status-fd", str(writer), *self._words],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[writer], start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        if self._status:
            self._status.close()
        self._status = os.fdopen(reader)  # bubblewrap writes there again when it ends
        line = self._status.readline()
        assert line, f"{self.name} did not start: {self.said()[-2000:]}"
        self._pid = json.loads(line)["child-pid"]

    @property
    def code(self) -> int | None:
        """The exit code of its last run; None while it runs and before it does."""
        return self._process.poll() if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """To its first process."""
        if self.running:
            os.kill(self._pid, number)

    def wait(self, timeout_s: float) -> int:
        """Its exit code, once it has ended for good."""
        assert self._process is not None
        code = self._process.wait(timeout_s)
        if self._status:
            self._status.close()
        return code

    def run(self, words: list[str], timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """`docker exec` without the container: another process in the same surroundings."""
        return subprocess.run(
            [*self._command, *words], env=self._environment, capture_output=True, text=True,
            timeout=timeout_s,
        )  # fmt: skip

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _tool(name: str) -> str:
    found = shutil.which(name)
    assert found, f"no {name}"
    return found


def _expanded(word: str, environment: dict[str, str]) -> str:
    """Kubernetes' `$(NAME)` in commands and arguments."""
    for name, value in environment.items():
        word = word.replace(f"$({name})", value)
    return word
