"""Memory after large uploads: what they took goes back to the system."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from loadtests.abuse.files import uploads
from service.settings import MIB
from service.web.heap import KEPT_BYTES, held_bytes
from service.web.intake import Intake
from service.web.uploads import decode_picture

MAX_PX = 4096 * 4096
WAIT_S = 60.0


def test_what_large_uploads_took_goes_back() -> None:
    """In a process of its own, whose memory is this test's alone."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import take_in; take_in()"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, most, after = map(int, done.stdout.split())
    assert most > before + 100 * MIB, "else nothing is shown by what is left"
    assert after <= before + KEPT_BYTES


def take_in() -> None:
    """Decode two of each kind side by side; print bytes held before, at most, and at last."""
    asyncio.run(_take_in())


async def _take_in() -> None:
    intake = Intake(num_workers=3, max_held_bytes=0)
    files = list(uploads().values())

    def decode(data: bytes) -> int:
        decode_picture(data, max_px=MAX_PX)
        return held_bytes()

    decode(files[0])  # which imports what it needs
    intake._heap.trim(idle=True)
    before = held_bytes()
    held = await asyncio.gather(*(intake.decode(lambda d=d: decode(d), WAIT_S) for d in files * 2))
    intake.release(0)
    until = asyncio.get_running_loop().time() + WAIT_S
    while held_bytes() > before + KEPT_BYTES and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0.1)
    print(before, max(held), held_bytes())
    intake.close()
