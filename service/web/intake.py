"""How much of what clients send is taken in at a time: bytes of bodies held, uploads decoded.

Both cost memory and time before anything is accepted, so both are bounded here. Called on the
event loop alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.batching.backlog import PUNCTUAL
from service.errors import DeadlineExceeded, Overloaded
from service.web.heap import Heap

T = TypeVar("T")
COST_WEIGHT = 0.2  # of the newest upload in the average cost
TRIM_AFTER_S = 2.0  # from a body that was let go to giving its memory back, with all that followed


class Intake:
    """Decodes in threads of its own, ``num_workers`` uploads at a time, so that no answer waits for
    them to be encoded. ``max_held_bytes`` bounds all bodies that are held.
    """

    def __init__(self, num_workers: int, max_held_bytes: int) -> None:
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="fourstep-upload")
        self._num_workers = num_workers
        self._max_held_bytes = max_held_bytes
        self._num_held_bytes = 0
        self._num_open = 0  # uploads that wait or are decoded
        self._s_each = 0.0  # seconds that an upload costs, measured
        self._heap = Heap()
        self._will_trim = self._is_closed = False

    def hold(self, num_bytes: int) -> None:
        """More of a body has come.

        Raises:
            Overloaded: there is no room for it; nothing of it was counted.
        """
        if self._num_held_bytes + num_bytes > self._max_held_bytes:
            raise Overloaded(
                f"{self._num_held_bytes} bytes of bodies are being read, of at most "
                f"{self._max_held_bytes}; try again",
                retry_after_s=1,
            )
        self._num_held_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """What was held is gone, or what was made of it."""
        self._num_held_bytes -= num_bytes
        if not self._will_trim:
            self._will_trim = True
            asyncio.get_running_loop().call_later(TRIM_AFTER_S, self._trim)

    def _trim(self) -> None:
        self._will_trim = False
        if not self._is_closed:
            idle = not (self._num_open or self._num_held_bytes)
            self._workers.submit(self._heap.trim, idle=idle)

    async def decode(self, work: Callable[[], T], left_s: float) -> T:
        """What ``work`` returns, once it is its turn.

        Raises:
            Overloaded: it would have to wait for more of ``left_s`` than there is.
            DeadlineExceeded: ``left_s`` has passed; what waits is not begun any more.
        """
        wait_s = (self._num_open + 1) * self._s_each / self._num_workers
        if self._num_open and wait_s > PUNCTUAL * left_s:
            raise Overloaded(
                f"{self._num_open} uploads are decoded before this one, which would take about "
                f"{wait_s:.1f} s in all; it has {left_s:.1f} s (X-Request-Timeout)",
                retry_after_s=wait_s - PUNCTUAL * left_s,
            )
        self._num_open += 1
        event_loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(left_s):
                result, seconds = await event_loop.run_in_executor(self._workers, _timed, work)
        except TimeoutError:
            raise DeadlineExceeded(
                "the upload was not decoded by the deadline; send a smaller image, or raise the "
                "deadline (X-Request-Timeout)"
            ) from None
        finally:
            self._num_open -= 1
        self._s_each += (COST_WEIGHT if self._s_each else 1.0) * (seconds - self._s_each)
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Begin no more; what is being decoded ends by itself."""
        self._is_closed = True
        self._workers.shutdown(wait=False, cancel_futures=True)


def _timed(work: Callable[[], T]) -> tuple[T | Exception, float]:
    """The outcome and what it took; a damaged upload costs what it costs as well."""
    begun = time.perf_counter()
    try:
        outcome: T | Exception = work()
    except Exception as error:
        outcome = error
    return outcome, time.perf_counter() - begun
