"""What may still come in where pictures and clips wait together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from service.batching.backlog import Backlog
from service.errors import Overloaded


def request(num_images: int, *, clip: bool = False, priority: int = 0) -> Any:
    return SimpleNamespace(num_images=num_images, is_clip=clip, priority=priority, tenant="")


def measured(max_rows: int) -> Backlog:
    """A picture, or a frame, has cost 0.1 s of the engine."""
    backlog = Backlog(max_rows)
    backlog.note_call(1.6)
    backlog.note_finished(16)
    return backlog


def test_a_clip_takes_the_room_of_its_frames() -> None:
    backlog = measured(40)
    backlog.add(request(16, clip=True))
    backlog.add(request(16, clip=True))
    backlog.check(8, "", 0, left_s=60)
    with pytest.raises(Overloaded, match="32 images are waiting or running, of at most 40"):
        backlog.check(9, "", 0, left_s=60)
    backlog.remove(request(16, clip=True))
    backlog.check(16, "", 0, left_s=60, clip=True)


def test_pictures_do_not_wait_for_clips_and_clips_do_for_pictures() -> None:
    backlog = measured(1000)
    backlog.add(request(160, clip=True))  # 16 s
    backlog.check(1, "", 0, left_s=1)
    with pytest.raises(Overloaded, match="160 images go before this request"):
        backlog.check(1, "", -1, left_s=1)  # of a lower priority it does
    backlog.add(request(20))  # 2 s
    backlog.check(16, "", 0, left_s=30, clip=True)
    with pytest.raises(Overloaded, match="180 images go before this request"):
        backlog.check(16, "", 0, left_s=20, clip=True)
