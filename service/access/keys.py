"""API keys: who may draw. Hashed at rest, compared in constant time, read again when they change.

A key file has one key a line, `NAME:SHA256`, as `fourstep key NAME` prints it, and behind it what
the key may have where that is not everything: `images_per_minute=60 max_open_images=8
priority=high`. Blank lines and those that begin with # are left out. It can be a mounted Kubernetes
secret.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.quota import Priority, Tenant
from service.errors import Unauthorized
from service.settings import SettingsError

logger = logging.getLogger("fourstep.keys")

NAME = re.compile(r"[\w.@-]{1,64}")
LINE = re.compile(rf"({NAME.pattern}):([0-9a-f]{{64}})((?: +\w+=\w+)*)")
SCHEMES = ("bearer", "key")  # the latter is what fal's clients say
LIMITS = ("images_per_minute", "max_open_images")
RELOAD_S = 1.0  # the file's date is looked at no more often
PROTECTED = "/v1/"
IMAGE_FILES = "/v1/images/files/"  # their names are secrets themselves, and an <img> sends no key


class KeyFileError(SettingsError):
    """The key file cannot be read; the message says which line and how it should look."""


def make_key(name: str, options: Mapping[str, str] = {}) -> tuple[str, str]:
    """A new key (43 characters of randomness after `fs-`), and its line for the file.

    Raises:
        KeyFileError: a name or an option that the file cannot have.
    """
    if not NAME.fullmatch(name):
        raise KeyFileError(f"name {name!r}: use 1 to 64 letters, digits and . _ @ -")
    key = f"fs-{secrets.token_urlsafe(32)}"
    line = " ".join([f"{name}:{digest_of(key)}", *(f"{k}={v}" for k, v in options.items())])
    try:
        _parse(line)
    except ValueError as error:
        raise KeyFileError(str(error)) from error
    return key, line


def _parse(line: str) -> tuple[str, Tenant]:
    """Digest and owner of one line.

    Raises:
        ValueError: it is not of the form that this module's first lines describe.
    """
    match = LINE.fullmatch(line)
    if match is None:
        raise ValueError("not NAME:SHA256 (64 hex digits); `fourstep key NAME` makes such a line")
    options = dict(option.split("=") for option in match[3].split())
    priority = options.pop("priority", "normal").upper()
    if priority not in Priority.__members__:
        raise ValueError(f"priority is {priority.lower()!r}; use low, normal or high")
    for name, value in options.items():
        if name not in LIMITS:
            raise ValueError(f"unknown option {name!r} (known: {', '.join(LIMITS)}, priority)")
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{name} is {value!r}; it must be a number of images from 1")
    limits = {name: int(value) for name, value in options.items()}
    return match[2], Tenant(match[1], Priority[priority], Priority[priority], **limits)


def digest_of(key: str) -> str:
    """What the file has of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """The keys of one file. Keys of this length need no slow hash: nobody can guess one."""

    def __init__(self, file: Path) -> None:
        """Raises KeyFileError where there is no such file, or it holds anything but keys."""
        self._file = file
        self._looked_at = time.monotonic()
        self._state = self._stat()
        self._owners = self._read()

    def owner_of(self, key: str) -> Tenant | None:
        """Whose key this is; every known one is compared, whichever fits."""
        self._refresh()
        given, found = digest_of(key), None
        for digest, owner in self._owners.items():
            if hmac.compare_digest(given, digest):
                found = owner
        return found

    def owner_by(self, digest: str) -> Tenant | None:
        """Whose key has this digest now, which was read of this file before."""
        self._refresh()
        return self._owners.get(digest)

    def owners(self, name: str) -> list[tuple[str, Tenant]]:
        """The digests of a name's keys, and what each may have."""
        self._refresh()
        return [(digest, owner) for digest, owner in self._owners.items() if owner.name == name]

    def _refresh(self) -> None:
        """Read the file again where it has changed; a damaged one leaves the keys as they were."""
        now = time.monotonic()
        if now - self._looked_at < RELOAD_S:
            return
        self._looked_at = now
        try:
            state = self._stat()
            if state != self._state:
                self._owners = self._read()
                self._state = state
                logger.info("%s read again: %d keys", self._file, len(self._owners))
        except KeyFileError as error:
            logger.error("the keys stay as they were: %s", error)

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = self._file.stat()
        except OSError as error:
            raise KeyFileError(f"api_keys_file {self._file}: {error.strerror}") from error
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    def _read(self) -> dict[str, Tenant]:
        owners: dict[str, Tenant] = {}
        try:
            lines = self._file.read_text().splitlines()
        except (OSError, UnicodeError) as error:
            raise KeyFileError(f"api_keys_file {self._file}: {error}") from error
        for number, text in enumerate(lines, start=1):
            line = text.strip()
            if not line or line.startswith("#"):
                continue
            try:
                digest, owner = _parse(line)
            except ValueError as error:
                where = f"api_keys_file {self._file}, line {number}"
                raise KeyFileError(f"{where}: {error}") from error
            owners[digest] = owner
        return owners


class Authentication:
    """Middleware: what is under /v1/ needs a key, but for images by their unguessable names.

    Probes, metrics and the studio page need none; a WebSocket's handler asks for it itself.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            exchange = scope["state"]["exchange"]  # put there by Telemetry, which is around this
            if exchange.path.startswith(PROTECTED) and not exchange.path.startswith(IMAGE_FILES):
                exchange.tenant = tenant_of(self._keys, Headers(scope=scope))
                exchange.log_fields["key"] = exchange.tenant.name
        await self._app(scope, receive, send)


def bearer_of(headers: Headers) -> str:
    """The key that was sent, known or not.

    Raises:
        Unauthorized: none was.
    """
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() not in SCHEMES or not key.strip():
        raise Unauthorized(
            "no API key was given; send it as `Authorization: Bearer <key>` (api_key of the "
            "openai client)"
        )
    return key.strip()


def tenant_of(keys: KeyRing, headers: Headers) -> Tenant:
    """Whose key was sent.

    Raises:
        Unauthorized: none was, or none that is known.
    """
    owner = keys.owner_of(bearer_of(headers))
    if owner is None:
        raise Unauthorized("this API key is not known here; ask whoever runs the service")
    return owner
