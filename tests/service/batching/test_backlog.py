"""What may still come in where pictures and clips wait together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from service.batching.backlog import Backlog
from service.batching.request import Kind
from service.errors import Overloaded

PICTURE, CLIP, LIVE = Kind("", 0), Kind("", 0, is_clip=True), Kind("", 0, is_live=True)


def request(num_images: int, kind: Kind = PICTURE) -> Any:
    return SimpleNamespace(num_images=num_images, kind=kind)


def measured(max_rows: int) -> Backlog:
    """A picture, or a frame, has cost 0.1 s of the engine."""
    backlog = Backlog(max_rows)
    backlog.note_call(1.6)
    backlog.note_finished(16)
    return backlog


def test_a_clip_takes_the_room_of_its_frames() -> None:
    backlog = measured(40)
    backlog.add(request(16, CLIP))
    backlog.add(request(16, CLIP))
    backlog.check(8, PICTURE, left_s=60)
    with pytest.raises(Overloaded, match="32 images are waiting or running, of at most 40"):
        backlog.check(9, PICTURE, left_s=60)
    backlog.remove(request(16, CLIP))
    backlog.check(16, CLIP, left_s=60)


def test_pictures_do_not_wait_for_clips_and_clips_do_for_pictures() -> None:
    backlog = measured(1000)
    backlog.add(request(160, CLIP))  # 16 s
    backlog.check(1, PICTURE, left_s=1)
    with pytest.raises(Overloaded, match="160 images go before this request"):
        backlog.check(1, Kind("", -1), left_s=1)  # of a lower priority it does
    backlog.add(request(20))  # 2 s
    backlog.check(16, CLIP, left_s=30)
    with pytest.raises(Overloaded, match="180 images go before this request"):
        backlog.check(16, CLIP, left_s=20)


def test_nothing_waits_for_live_frames_but_live_frames() -> None:
    backlog = measured(1000)
    for _ in range(60):
        backlog.add(request(1, LIVE))  # 6 s
    backlog.check(1, PICTURE, left_s=1)
    backlog.check(1, CLIP, left_s=1)
    for kind in (LIVE, Kind("", -1)):
        with pytest.raises(Overloaded, match="60 images go before this request"):
            backlog.check(1, kind, left_s=1)
    backlog.add(request(20, CLIP))
    with pytest.raises(Overloaded, match="80 images go before this request"):
        backlog.check(1, LIVE, left_s=1)
