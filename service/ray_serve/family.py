"""The processes that `fourstep serve` has started: whether Ray's own live, and how all of them end.

Without its raylet or its GCS Ray replaces nothing that dies, and does not stop when it is told to;
a minute after its GCS it ends this process, and leaves HAProxy on its port. So they are looked at
here, and all is ended without Ray's help where one is gone. A GCS that gets SIGTERM closes its port
at once, and its process stays: it counts as gone.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator

import psutil

from service.ray_serve.machine import ServeError

VITAL = {"raylet": "raylet", "gcs_server": "GCS"}  # process → Ray's name for it
REPLICAS = "ray::ServeRepli"
KEEPERS = ("ray::HAProxyMan", "ray::ServeContr")  # what would start another HAProxy
EXIT_WAIT_S = 10.0
WATCH_EVERY_S = 0.5  # a replica that is younger has nothing to finish yet
FINISH_LOOK_S = 0.5
CONNECT_S = 5.0  # to a GCS that is busy; one that is gone refuses at once


class RayLost(ServeError):
    """One of Ray's own processes is gone."""


class Family:
    """All descendants of this process, those too whose parents have died since they were seen; and
    each HAProxy with a configuration in ``folder``, whoever has started it and died.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._seen: dict[int, psutil.Process] = {}
        self._vital: dict[str, psutil.Process] = {}  # by Ray's name for it
        self._gcs: tuple[str, int] | None = None
        self.lost = False  # whether `check` has found Ray gone

    def meet(self, gcs_address: str) -> None:
        """To be called once Ray runs; ``gcs_address`` is HOST:PORT."""
        host, _, port = gcs_address.rpartition(":")
        self._gcs = host.strip("[]"), int(port)
        self.remember()

    def remember(self) -> None:
        """See who is there; to be called now and then."""
        found = [*psutil.Process().children(recursive=True), *self._proxies()]
        self._seen |= {process.pid: process for process in found}
        for process in found if not self._vital else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                if (name := process.name()) in VITAL:
                    self._vital[VITAL[name]] = process

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Whoever comes meanwhile is seen: replicas answer before the call that starts them ends,
        and once their raylet is gone they are nobody's descendants.
        """
        over = threading.Event()

        def watch() -> None:
            while not over.wait(WATCH_EVERY_S):
                self.remember()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def check(self) -> None:
        """Raise `RayLost` where Ray cannot go on."""
        gone = [name for name, process in self._vital.items() if not _alive(process)]
        if not gone and self._gcs and not _listens(self._gcs):
            gone = [VITAL["gcs_server"]]
        for name in gone:
            self.lost = True
            raise RayLost(
                f"Ray's {name} is gone (killed? no memory?): nothing would replace a replica "
                "that fails. What had come in was finished; start the service again"
            )

    def finish(self, within_s: float) -> None:
        """Without Ray: no connection comes in any more, and those that are open get answers."""
        self.remember()
        for process in self._named(*KEEPERS):  # killed, a raylet would end HAProxy with them
            process.suspend()
        self.remember()  # what they had started meanwhile
        proxies = list(self._named("haproxy"))
        for process in proxies:
            process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + within_s
        while any(_has_connections(process) for process in proxies):  # it stays some 10 s more
            if time.monotonic() > deadline or not any(self._named(REPLICAS)):
                break  # nobody is left who could answer
            psutil.wait_procs(proxies, timeout=FINISH_LOOK_S)

    def end(self, *, by_themselves_s: float = EXIT_WAIT_S / 3) -> None:
        """End what is left, HAProxy above all: only our own descendants, by their ids.

        They have ``by_themselves_s`` to go before they are told to.
        """
        with contextlib.suppress(psutil.NoSuchProcess):
            self.remember()
        processes: Iterable[psutil.Process] = self._seen.values()
        _, processes = psutil.wait_procs(processes, timeout=by_themselves_s)
        for send in (psutil.Process.terminate, psutil.Process.kill):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    send(process)
            _, processes = psutil.wait_procs(processes, timeout=EXIT_WAIT_S / 3)

    def _proxies(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == "haproxy" and self._folder in " ".join(process.cmdline()):
                    yield process

    def _named(self, *beginnings: str) -> Iterator[psutil.Process]:
        for process in list(self._seen.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                if _alive(process) and process.name().startswith(beginnings):
                    yield process


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, CONNECT_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # too busy to say
        return True
    return True


def _has_connections(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        connections = process.net_connections("tcp")
        return any(each.status != psutil.CONN_LISTEN for each in connections)
    return False
