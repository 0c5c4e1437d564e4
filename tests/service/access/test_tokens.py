"""Tokens of live sessions: for a minute, of keys that are in the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.access.keys import KeyRing, make_key
from service.access.tokens import LIFE_S, digest_of_token, make_token
from service.errors import Unauthorized

NOW = 1_000_000.5


@pytest.fixture
def keys(tmp_path: Path) -> tuple[KeyRing, str]:
    (key, line), (_, other) = make_key("a.b@c"), make_key("other", {"priority": "low"})
    file = tmp_path / "keys"
    file.write_text(f"{line}\n{other}\n")
    return KeyRing(file), key


def test_a_token_is_its_keys_for_a_minute(keys: tuple[KeyRing, str]) -> None:
    ring, key = keys
    token = make_token(ring, key, clock=lambda: NOW)
    digest = digest_of_token(ring, token, clock=lambda: NOW + LIFE_S - 1)
    owner = ring.owner_by(digest)
    assert owner is not None
    assert owner.name == "a.b@c"
    with pytest.raises(Unauthorized, match="has expired"):
        digest_of_token(ring, token, clock=lambda: NOW + LIFE_S)


def test_no_other_text_is_one(keys: tuple[KeyRing, str]) -> None:
    ring, key = keys
    token = make_token(ring, key, clock=lambda: NOW)
    name, expires, signature = token.rsplit(".", 2)
    for wrong in (
        "", ".", "..", name, key, f"other.{expires}.{signature}", f"{name}.{expires}9.{signature}",
        f"{name}.{expires}.{signature[:-1]}", f"{name}.{expires}.", f"{name}.é.{signature}",
    ):  # fmt: skip
        with pytest.raises(Unauthorized, match="not known"):
            digest_of_token(ring, wrong, clock=lambda: NOW)
