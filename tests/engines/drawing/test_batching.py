"""Default batches: no call draws more pixels than its device can bear in time and memory."""

from __future__ import annotations

import pytest

from engines.backends.graphs import bucket_of
from engines.drawing.batching import decode_rows, denoise_rows, rows_that_fit


@pytest.mark.parametrize(
    ("device", "size_px", "denoise", "decode"),
    [
        ("cpu", 128, 8, 2),  # the demo models
        ("cpu", 256, 4, 2),
        ("cpu", 512, 2, 1),  # SD 1.5: gigabytes and seconds a row
        ("cpu", 1024, 2, 1),
        ("cuda", 512, 8, 4),
        ("cuda", 1024, 8, 2),  # SDXL
        ("cuda", 2048, 8, 1),
    ],
)
def test_rows_by_pixels(device: str, size_px: int, denoise: int, decode: int) -> None:
    assert denoise_rows(device, size_px) == denoise
    assert decode_rows(device, size_px, denoise) == decode


def test_a_decode_is_never_of_more_rows_than_a_step() -> None:
    assert decode_rows("cuda", 512, max_batch=3) == 3


def test_buckets_are_exact_where_batches_are_small_and_few_where_they_are_large() -> None:
    assert [bucket_of(rows) for rows in range(1, 9)] == list(range(1, 9))
    assert [bucket_of(rows) for rows in (9, 10, 11, 17, 20, 21, 33, 63)] == [
        10, 10, 12, 20, 20, 24, 40, 64,
    ]  # fmt: skip
    for rows in range(1, 129):
        assert rows <= bucket_of(rows) <= rows * 5 / 4
    assert len({bucket_of(rows) for rows in range(1, 65)}) == 20


@pytest.mark.parametrize(
    ("width", "height", "rows"), [(512, 512, 8), (768, 768, 3), (1024, 1024, 2), (2048, 2048, 1)]
)
def test_large_rows_are_decoded_a_few_at_a_time(width: int, height: int, rows: int) -> None:
    assert rows_that_fit(width * height) == rows
