"""Tokens that let a browser, which cannot set a header on a WebSocket, in for a minute.

``NAME.EXPIRES.SIGNATURE``, signed with the digest of a key, which every replica reads from the key
file: any replica takes them, nothing is kept, and a key that leaves the file ends its tokens.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

from service.access.keys import KeyRing, digest_of
from service.errors import Unauthorized

LIFE_S = 60


def make_token(keys: KeyRing, key: str, clock: Callable[[], float] = time.time) -> str:
    """A token of the owner of ``key``, which is a known one."""
    owner = keys.owner_of(key)
    assert owner is not None, "Authentication has let it in"
    content = f"{owner.name}.{int(clock()) + LIFE_S}"
    return f"{content}.{_signature(digest_of(key), content)}"


def digest_of_token(keys: KeyRing, token: str, clock: Callable[[], float] = time.time) -> str:
    """The digest of the key that it stands for.

    Raises:
        Unauthorized: it is none, has expired, or its key has left the file.
    """
    content, _, signature = token.rpartition(".")
    name, _, expires = content.rpartition(".")
    for digest, _ in keys.owners(name):
        if hmac.compare_digest(_signature(digest, content).encode(), signature.encode()):
            if int(expires) >= clock():
                return digest
            raise Unauthorized("this token has expired; ask POST /v1/realtime/tokens for another")
    raise Unauthorized("this token is not known here; ask POST /v1/realtime/tokens for one")


def _signature(digest: str, content: str) -> str:
    return hmac.new(bytes.fromhex(digest), content.encode(), hashlib.sha256).hexdigest()
