"""What `fourstep serve` shows of what Ray's processes write: our words, and its log."""

from __future__ import annotations

import datetime
import json
from typing import Any

import typer

LOG_LINE = '{"time": '  # how the lines of `service.web.logs` begin


class Output:
    """In place of Ray's printing, which shows whatever its processes write, lines with a prefix.

    Our log is shown as it is, and while ``serving`` Ray's own errors (a process killed for want of
    memory, say) as lines of it. All else lies in `logs_folder` alone.
    """

    def __init__(self) -> None:
        self.serving = True

    def begin(self) -> None:
        """To be called before ``ray.init``."""
        from ray._private import worker

        worker.print_to_stdstream = self

    def __call__(self, batch: dict[str, Any], ignore_prefix: bool) -> None:
        for line in batch["lines"]:
            if line.startswith(LOG_LINE):
                typer.echo(line, err=True)
            elif batch["pid"] == "raylet" and self.serving:
                time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
                entry = {"time": time, "level": "warning", "logger": "ray", "message": line}
                typer.echo(json.dumps(entry, ensure_ascii=False), err=True)


def logs_folder() -> str:
    from ray._private.worker import global_worker

    return str(global_worker.node.get_logs_dir_path())
