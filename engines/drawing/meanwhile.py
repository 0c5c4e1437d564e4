"""Another model serves while the one that was ordered is built: the build, and what comes of it.

Run as `python -m engines.drawing.meanwhile` it is the building process: exporting and compiling
hold an interpreter for minutes, so the serving one is spared. It ends when its parent does. Nothing
here touches an engine that serves: see `Runner.succeed`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from engines.backends.choice import choose_backend
from engines.drawing.model import Model, load_built, prepare
from engines.errors import BuildError, EngineError
from engines.facts import Defaults
from engines.order import Order

logger = logging.getLogger("fourstep.build")
NICENESS = 5  # serving comes first; where nothing is drawn the build has the cores anyway
CHILD = (sys.executable, "-m", "engines.drawing.meanwhile")


class BackgroundBuild:
    """Builds and loads what an order asks for, and hands it to ``ready`` on a thread of its own.

    Where that fails, ``failed`` is told why.
    """

    def __init__(
        self, order: Order, ready: Callable[[Model], None], failed: Callable[[str], None]
    ) -> None:
        self._order, self._ready, self._failed = order, ready, failed
        self._process: subprocess.Popen[bytes] | None = None  # by start()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fourstep-build", daemon=True)

    def start(self) -> None:
        self._process = subprocess.Popen(
            CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, good or bad; False if it has not come by then."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """End the build; what it has finished so far is kept for the next one."""
        self._closed.set()
        if self._process is not None:
            self._process.kill()
            self._thread.join()

    def _run(self) -> None:
        assert self._process is not None, "start() makes it"
        try:
            self._wait_for(self._process)
            if not self._closed.is_set():
                quiet = lambda what, done, total: None  # noqa: E731 - it was built just now
                choice = choose_backend(self._order.backend, device=self._order.device)
                self._ready(load_built(self._order, choice, quiet))
        except Exception as error:  # of any kind: the model that serves goes on
            if not self._closed.is_set():
                logger.exception("%s is not ready and will not be", self._order.model)
                self._failed(str(error).splitlines()[0] if str(error) else repr(error))

    def _wait_for(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None, "a pipe was asked for"
        assert process.stdout is not None, "a pipe was asked for"
        with process:
            process.stdin.write(_dump(self._order))
            process.stdin.flush()  # and it stays open: its end tells the child of ours
            last = "it said nothing"
            for line in process.stdout:
                last = line.decode(errors="replace").strip() or last
                logger.info("building %s: %s", self._order.model, last)
            code = process.wait()
        if code and not self._closed.is_set():
            raise BuildError(f"building {self._order.model} ended with code {code}: {last}")


def _dump(order: Order) -> bytes:
    """An order as one line of JSON."""
    return json.dumps(dataclasses.asdict(order), default=str).encode() + b"\n"


def _load(line: bytes) -> Order:
    values = json.loads(line)
    listed = values["defaults"]["timesteps"]
    timesteps = None if listed is None else tuple(listed)
    return Order(
        **values
        | {
            "cache_dir": Path(values["cache_dir"]),
            "defaults": Defaults(**values["defaults"] | {"timesteps": timesteps}),
        }
    )


def main() -> None:
    """Build what the order on stdin asks for, a line of progress at a time."""
    order = _load(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(NICENESS)
    try:
        prepare(order, lambda what, done, total: print(f"[{done}/{total}] {what}", flush=True))
    except EngineError as error:
        print(error, flush=True)
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    # Not by sys.stdin, whose lock an interpreter that ends would find taken.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
