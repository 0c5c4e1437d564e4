"""What goes over the wire of ``fourstep.v1``: objects in MessagePack, or the same in JSON.

A binary message is MessagePack and a text message JSON, in which bytes are base64.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Literal, Protocol, TypeVar

import msgpack
import orjson
from pydantic import BaseModel, Field, ValidationError

from service.errors import BadRequest
from service.settings import Settings
from service.web.admission import at_most
from service.web.parsing import bad_request, check_values, shown
from service.web.schema import Input

T = TypeVar("T")

PROTOCOL = "fourstep.v1"
# Of one message: no value that is of use has more. Four million empty lists, which compress to a
# few kilobytes, would hold up the event loop for a second.
MAX_LISTS, MAX_ITEMS = 64, 1024
NANOSECONDS = 2  # how msgpack gives points of time: as numbers, which cost least


class LiveOptions(Input):
    """What a session says of its frames besides the fields of an edit."""

    max_fps: float = Field(30.0, gt=0, le=120, description="Frames a second that are drawn.")
    similarity: float | None = Field(
        None,
        ge=0.5,
        le=1,
        description="A frame whose picture is at least as like the last drawn one (cosine of small "
        "grey copies) is skipped. Default: none is.",
    )
    prompt_blend: int = Field(
        0, ge=0, le=600, description="Frames over which a new prompt takes the place of the old."
    )
    prompt_b: str | None = Field(None, min_length=1, description="A prompt to move towards.")
    prompt_b_share: float = Field(
        0, ge=0, le=1, description="How far: 0 is `prompt` alone, 1 `prompt_b` alone."
    )


SESSION_FIELDS = tuple(LiveOptions.model_fields)


class SessionUpdate(BaseModel):
    """``session.update``: what it names holds from now on, what it leaves out stays."""

    type: Literal["session.update"]
    values: dict[str, Any]


class Frame(BaseModel):
    """``frame``: one picture to draw; ``values`` hold for it alone."""

    type: Literal["frame"]
    id: Any  # a number or a text, which comes back as it is
    image: Any = None  # as it was sent, see `bytes_of`
    mask: Any = None
    values: dict[str, Any]


class Wire(Protocol):
    """How one client and a session understand each other."""

    image: str  # what the fields are called in which pictures come
    mask: str

    def read(self, data: bytes | str) -> SessionUpdate | Frame:
        """One message of the client.

        Raises:
            BadRequest: it is none; the message says what is wrong.
        """

    def write(self, message: dict[str, Any]) -> bytes | str | None:
        """A message to the client; None: it is told nothing of this."""


class Plain:
    """``fourstep.v1`` itself; answers have the form of the client's last message."""

    image, mask = "image", "mask"

    def __init__(self) -> None:
        self._binary = True

    def read(self, data: bytes | str) -> SessionUpdate | Frame:
        self._binary = isinstance(data, bytes)
        given = unpack(data)
        kind = given.pop("type", None)
        if kind == "session.update":
            return SessionUpdate(type=kind, values=given)
        if kind != "frame":
            raise BadRequest(
                f"type is {shown(kind)}; it must be 'session.update' or 'frame'", param="type"
            )
        number = given.pop("id", None)
        if not isinstance(number, int | str) or isinstance(number, bool) or len(str(number)) > 64:
            raise BadRequest(
                "id is missing, or no integer of 64 bits and no text of at most 64 characters; "
                "give each frame one",
                param="id",
            )
        image, mask = given.pop(self.image, None), given.pop(self.mask, None)
        return Frame(type="frame", id=number, image=image, mask=mask, values=given)

    def write(self, message: dict[str, Any]) -> bytes | str:
        if self._binary:
            return msgpack.packb(message)  # type: ignore[no-any-return]
        return orjson.dumps(message, default=_as_base64).decode()


def unpack(message: bytes | str) -> dict[str, Any]:
    """One object, in MessagePack or JSON.

    Raises:
        BadRequest: it is none.
    """
    given = _unpack(message)
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise BadRequest("a message is one object with a `type`: session.update or frame")
    return given


def _unpack(message: bytes | str) -> Any:
    try:
        if isinstance(message, bytes):
            return _from_msgpack(message)
        text = message.encode()
        check_values(text)
        return orjson.loads(text)
    except ValueError as error:
        form = "MessagePack" if isinstance(message, bytes) else "JSON"
        raise BadRequest(f"the message is not {form}: {str(error)[:200]}") from None
    except RecursionError:
        raise BadRequest("the message is nested too deeply") from None


def _from_msgpack(message: bytes) -> Any:
    num_lists = 0

    def counted(value: T) -> T:
        nonlocal num_lists
        num_lists += 1
        if num_lists > MAX_LISTS:
            raise ValueError(f"it has more than {MAX_LISTS} lists and objects")
        return value

    return msgpack.unpackb(
        message, ext_hook=_no_extension, list_hook=counted, object_hook=counted,
        max_array_len=MAX_ITEMS, max_map_len=MAX_LISTS, timestamp=NANOSECONDS,
    )  # fmt: skip


def _no_extension(code: int, data: bytes) -> None:
    raise ValueError(f"extension type {code} is of no use here")


def bytes_of(name: str, value: Any) -> bytes:
    """A file that was sent as bytes, base64 or a ``data:`` URL."""
    if isinstance(value, bytes):
        return value
    try:
        text = value.partition(",")[2] if value.startswith("data:") else value
        return base64.b64decode(text, validate=True)
    except (AttributeError, binascii.Error, ValueError):
        raise BadRequest(
            f"{name} is neither bytes nor base64; send a PNG, JPEG or WebP file", param=name
        ) from None


def _as_base64(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(type(value))


def split_options(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of `LiveOptions`, and those of an edit."""
    options = {name: values[name] for name in SESSION_FIELDS if name in values}
    return options, {name: value for name, value in values.items() if name not in options}


def options_of(values: dict[str, Any], settings: Settings) -> LiveOptions:
    """Raises BadRequest for the first one that is wrong."""
    try:
        options = LiveOptions.model_validate(values)
    except ValidationError as error:
        raise bad_request(error, LiveOptions) from error
    at_most("prompt_b", len(options.prompt_b or ""), settings.max_prompt_chars, " characters")
    return options
