"""The soak's arithmetic; the command itself runs in `test_commands`."""

from __future__ import annotations

import pytest

from loadtests.resources import quarters


def test_quarters_are_medians_in_order() -> None:
    assert quarters([1, 1, 9, 2, 2, 2, 3, 3, 3, 4, 0, 4]) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="3 memory samples are too few"):
        quarters([1, 2, 3])
