"""What one key may have: a minute's images, images at a time; and the lines that say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.access.keys import KeyFileError, KeyRing, make_key
from service.access.quota import MINUTE_S, Priority, Quotas, Tenant
from service.errors import BadRequest, RateLimited


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=100, deadline=None)
@given(
    limit=st.integers(1, 30),
    asked=st.lists(st.tuples(st.floats(0, 90), st.integers(1, 10)), max_size=40),
)
def test_no_minute_holds_more_than_twice_the_rate_and_the_retry_time_is_exact(
    limit: int, asked: list[tuple[float, int]]
) -> None:
    clock, taken = Clock(), []
    quotas, tenant = Quotas(clock), Tenant("alice", images_per_minute=limit)
    for pause_s, num_images in asked:
        clock.now += pause_s
        try:
            quotas.take(tenant, num_images)
        except BadRequest:
            assert num_images > limit
            continue
        except RateLimited as error:
            clock.now += min(error.retry_after_s or 0.0, MINUTE_S)
            quotas.take(tenant, num_images)  # it must do now
        taken.append((clock.now, num_images))
        in_a_minute = sum(n for at, n in taken if at > clock.now - MINUTE_S)
        assert in_a_minute <= 2 * limit
    if taken:
        seconds = clock.now - taken[0][0]
        assert sum(n for _, n in taken) <= limit * (1 + seconds / MINUTE_S) + 1e-6


def test_images_at_a_time_are_counted_until_given_back() -> None:
    quotas, tenant = Quotas(Clock()), Tenant("alice", max_open_images=4)
    quotas.take(tenant, 3)
    with pytest.raises(RateLimited, match=r"3 images .* add 2; at most 4"):
        quotas.take(tenant, 2)
    quotas.take(Tenant("bob", max_open_images=4), 4)
    quotas.give_back(tenant, 3)
    quotas.take(tenant, 4)


def test_what_was_not_accepted_costs_nothing() -> None:
    quotas, tenant = Quotas(Clock()), Tenant("alice", images_per_minute=4, max_open_images=4)
    for _ in range(3):
        quotas.take(tenant, 4)
        quotas.refund(tenant, 4)
    quotas.take(tenant, 4)
    with pytest.raises(RateLimited, match="4 images of this API key are waiting"):
        quotas.take(tenant, 1)


def test_a_request_that_no_waiting_could_help_is_a_bad_one() -> None:
    with pytest.raises(BadRequest, match="n is 5; this API key may have 4 images a minute"):
        Quotas(Clock()).take(Tenant("alice", images_per_minute=4), 5)


def test_a_line_says_what_its_key_may_have(tmp_path: Path) -> None:
    options = {"images_per_minute": "60", "max_open_images": "8", "priority": "high"}
    key, line = make_key("alice", options)
    file = tmp_path / "keys"
    file.write_text(line)
    owner = KeyRing(file).owner_of(key)
    assert owner == Tenant("alice", Priority.HIGH, Priority.HIGH, 60, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("images_per_minute=0", "images_per_minute is '0'; it must be a number of images from 1"),
        ("max_open_images=many", "max_open_images is 'many'"),
        ("images=3", "unknown option 'images' .known: images_per_minute, max_open_images, pri"),
        ("priority=urgent", "priority is 'urgent'; use low, normal or high"),
        ("images_per_minute", "not NAME:SHA256"),
    ],
)
def test_a_line_of_another_form_is_refused(tmp_path: Path, options: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{make_key('alice')[1]} {options}\n")
    with pytest.raises(KeyFileError, match=f"line 1: {message}"):
        KeyRing(file)


@pytest.mark.parametrize(
    ("own", "asked", "given"),
    [
        (Tenant(), None, Priority.NORMAL),
        (Tenant(), Priority.HIGH, Priority.HIGH),
        (Tenant("a", Priority.NORMAL, Priority.NORMAL), Priority.HIGH, Priority.NORMAL),
        (Tenant("a", Priority.HIGH, Priority.HIGH), None, Priority.HIGH),
        (Tenant("a", Priority.HIGH, Priority.HIGH), Priority.LOW, Priority.LOW),
    ],
)
def test_a_request_may_ask_for_less_than_its_key_has(
    own: Tenant, asked: Priority | None, given: Priority
) -> None:
    assert own.allowed(asked) == given
