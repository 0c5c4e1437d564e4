"""CUDA graph captures: one at a time in a process, and nothing left of one that failed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_ONE_AT_A_TIME = threading.Lock()  # torch's own condition, whatever the streams and threads


@contextlib.contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None
) -> Iterator[None]:
    """Capture what is done inside on ``stream`` into ``graph``; other threads may allocate then.

    Whatever is raised goes on, with the stream that was current before current again and the graph
    empty: the work can then be done eagerly.
    """
    before = torch.cuda.current_stream()
    with _ONE_AT_A_TIME:
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                yield
        except BaseException:
            torch.cuda.set_stream(before)  # torch forgets to, where ending the capture fails too
            with contextlib.suppress(RuntimeError):
                graph.reset()
            raise
