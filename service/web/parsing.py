"""Bodies to parameters: JSON and multipart, with OpenAI-shaped errors that name the field."""

from __future__ import annotations

import asyncio
import base64
import codecs
import difflib
import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from service.errors import BadRequest, TooLarge
from service.settings import Settings
from service.web.schema import (
    DrawParams,
    EditBody,
    EditParams,
    EditRequest,
    GenerationRequest,
    ImageParams,
    ImageReference,
    Input,
    OutputFormat,
)

P = TypeVar("P", bound=DrawParams)
T = TypeVar("T", bound=ImageParams)
F = TypeVar("F", bound=str)

JSON = "application/json"
FILES = {"image": "image", "image[]": "image", "mask": "mask"}  # part of a form → what it is
BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{1,70}")  # RFC 2046, 5.1.1
MAX_FORM_FIELDS = 64
MAX_FORM_FILES = 8
MAX_FIELD_BYTES = 2**20  # of one form field that is no file
MAX_ERRORS = 100  # more than a body has fields; of 15,000 the details alone would cost 0.4 s
MAX_JSON_VALUES = 2**16  # of an edit; the two longest prompts may be all commas
MAX_SHOWN_CHARS = 80  # of a wrong value, in the message about it
MAX_PARAM_CHARS = 64  # longer than the name of any field


class Upload(NamedTuple):
    """An image as it came, and the field that it came in."""

    data: bytes
    field: str


class Uploads(NamedTuple):
    """What an edit starts from."""

    image: Upload
    mask: Upload | None


async def parse_generation(request: Request, settings: Settings) -> GenerationRequest:
    """The JSON body of ``POST /v1/images/generations``."""
    check_plain(request)
    media_type, options = content_type(request, default=JSON)
    if media_type != JSON:
        raise BadRequest(f"the Content-Type is {shown(media_type)}; it must be {JSON}")
    check_charset(options)
    body = await read_body(request, max_json_bytes(settings.max_prompt_chars))
    return from_json(body, GenerationRequest, settings)


def from_json(body: bytes, model: type[P], settings: Settings) -> P:
    body = _utf8(body)
    try:
        params = model.model_validate_json(body, extra=extra_of(settings))
    except ValidationError as error:
        raise bad_request(error, model) from error
    json.loads(body, object_pairs_hook=_unique)  # known to be right: a few microseconds a KiB
    return params


def extra_of(settings: Settings) -> Literal["forbid", "allow"]:
    """What becomes of unknown fields; those that are allowed stay in sight, to be warned of."""
    return "allow" if settings.unknown_fields == "ignore" else "forbid"


def content_type(request: Request, default: str = "") -> tuple[str, dict[bytes, bytes]]:
    media_type, options = parse_options_header(request.headers.get("content-type", default))
    return media_type.decode("latin-1"), options


def check_charset(options: dict[bytes, bytes]) -> None:
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        raise BadRequest(
            f"the Content-Type says that the body is {shown(charset)}; JSON is read as UTF-8, "
            "send it as that"
        )


def check_plain(request: Request) -> None:
    """Bodies are read as they are: one that unfolds could be any size."""
    coding = request.headers.get("content-encoding", "identity").strip()
    if coding.lower() not in ("", "identity"):
        raise BadRequest(
            f"the Content-Encoding is {shown(coding)}; compressed bodies are not read, send it "
            "uncompressed and without that header"
        )


def _utf8(body: bytes) -> bytes:
    """The body without the byte-order mark that some editors and shells put before UTF-8."""
    encoding = json.detect_encoding(body)
    if encoding.startswith(("utf-16", "utf-32")):
        raise BadRequest(
            f"the JSON body is {encoding[:6].upper()} text; JSON is read as UTF-8, send it as that"
        )
    return body.removeprefix(codecs.BOM_UTF8)


def max_json_bytes(max_prompt_chars: int) -> int:
    """What a generation's body may have: two prompts, all escaped (12 bytes a character), more."""
    return 2 * 12 * max_prompt_chars + 64 * 1024


async def read_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise TooLarge(
                f"the JSON body has more than {max_bytes} bytes, which is room for the two longest "
                "prompts; shorten them"
            )
    return bytes(body)


def _unique(pairs: list[tuple[str, Any]]) -> None:
    """A name that stands twice would mean one thing to a gateway and another here."""
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise BadRequest(f"{cut(name)} is given twice; send it once", param=cut(name))
        seen.add(name)


async def parse_edit(request: Request, settings: Settings) -> tuple[EditParams, Uploads]:
    """The body of ``POST /v1/images/edits``, a form or JSON: parameters, the image, its mask."""
    check_plain(request)
    media_type, options = content_type(request)
    if media_type == JSON:
        check_charset(options)
        body = await request.body()  # as large as an upload: read beside the event loop
        return await asyncio.to_thread(_edit_from_json, body, settings)
    return await _edit_from_form(request, settings)


def _edit_from_json(body: bytes, settings: Settings) -> tuple[EditBody, Uploads]:
    check_values(body)
    params = from_json(body, EditBody, settings)
    sent = [] if params.image is None else [("image", params.image)]
    for index, reference in enumerate(params.images or ()):
        sent += _referred(reference, f"images.{index}")
    if len(sent) != 1:
        raise BadRequest(
            f"image must be exactly one, got {len(sent)}; send it in base64 as image, or as a "
            "data: URL in images[0].image_url",
            param="image",
        )
    sent += [] if params.mask is None else _referred(params.mask, "mask")
    image, *masks = (Upload(_decoded(text, field), field) for field, text in sent)
    return params, Uploads(image, masks[0] if masks else None)


def _referred(reference: ImageReference, name: str) -> list[tuple[str, str]]:
    """The field and the text of an image, if there is any."""
    if reference.file_id is not None:
        raise BadRequest(
            f"{name}.file_id is given; this service keeps no uploads, send the image in image_url "
            "as a data: URL",
            param=f"{name}.file_id",
            code="unsupported_parameter",
        )
    return [] if reference.image_url is None else [(f"{name}.image_url", reference.image_url)]


def check_values(body: bytes) -> None:
    """Raises TooLarge where there may be more than `MAX_JSON_VALUES`: 20 MB of base64 hold up the
    event loop for 50 ms, as many of ``[]`` for 2 s, with 1 GB.
    """
    num_values = 1 + sum(body.count(mark) for mark in (b",", b"[", b"{"))  # or more
    if num_values > MAX_JSON_VALUES:
        raise TooLarge(
            f"the JSON has about {num_values} values; at most {MAX_JSON_VALUES} are accepted, "
            "send the image in base64, as one string"
        )


def _decoded(text: str, field: str) -> bytes:
    """The bytes of base64 text, bare or in a ``data:`` URL; its media type is not believed."""
    head, comma, payload = text.partition(",")
    begin = shown(text[:MAX_SHOWN_CHARS])
    if not comma and ":" not in head:
        payload = head
    elif not re.match(r"data:.*;base64$", head, re.IGNORECASE):
        raise BadRequest(
            f"{field} is {begin}; this service fetches no URL, send the image itself in "
            "base64 or as data:image/png;base64,...",
            param=field,
        )
    try:
        return base64.b64decode("".join(payload.split()), validate=True)  # some wrap their lines
    except ValueError as error:
        raise BadRequest(
            f"{field} is {begin}, which is not base64; send the whole file, encoded with padding",
            param=field,
        ) from error


async def _edit_from_form(request: Request, settings: Settings) -> tuple[EditRequest, Uploads]:
    form = await read_form(request, ", with one file field `image`")
    try:
        fields, files = sort_parts(form, settings, EditRequest, FILES)
        images = [Upload(await file.read(), name) for name, file in files if name == "image"]
        masks = [Upload(await file.read(), name) for name, file in files if name == "mask"]
        if len(images) != 1:
            raise BadRequest(f"image must be exactly one file, got {len(images)}", param="image")
        if len(masks) > 1:
            raise BadRequest(f"mask must be at most one file, got {len(masks)}", param="mask")
    finally:
        await form.close()
    try:
        params = EditRequest.model_validate(fields, extra=extra_of(settings))
    except ValidationError as error:
        raise bad_request(error, EditRequest) from error
    return params, Uploads(images[0], masks[0] if masks else None)


def sort_parts(
    form: FormData, settings: Settings, model: type[Input], known_files: Mapping[str, str]
) -> tuple[dict[str, str], list[tuple[str, UploadFile]]]:
    """Text by name, and the files that are known. An empty file is empty text; without a name it is
    no image.
    """
    fields: dict[str, str] = {}
    files: list[tuple[str, UploadFile]] = []
    for as_it_came, value in form.multi_items():
        name = _text(as_it_came, of="the name of a field")
        known = known_files.get(name)
        if isinstance(value, UploadFile):
            # Browsers send an empty file without a name where none was chosen.
            if not value.size and not (known == "image" and value.filename):
                value = ""
            elif known:
                files.append((known, value))
                continue
            elif name in model.model_fields or extra_of(settings) == "forbid":
                taken = " and ".join(dict.fromkeys(known_files.values()))
                hint = f"only {taken} are" if taken else "send it as text"
                raise BadRequest(f"{cut(name)} is a file; {hint}", param=cut(name))
            else:
                value = ""
        if known and value:
            raise BadRequest(f"{known} is text; send it as a file", param=known)
        if name in fields:
            raise BadRequest(f"{cut(name)} is given twice; send it once", param=cut(name))
        if not known:
            fields[name] = _text(value, of=cut(name))
    return fields, files


async def read_form(request: Request, whose: str = "") -> FormData:
    """The parts by name, names and text as `_text` takes them; ``whose`` says what is in one."""
    media_type, options = content_type(request)
    if media_type != "multipart/form-data":
        raise BadRequest(
            f"the Content-Type is {shown(media_type)}; it must be multipart/form-data{whose}, or "
            f"{JSON}"
        )
    boundary = options.get(b"boundary", b"").decode("latin-1")
    if not BOUNDARY.fullmatch(boundary):
        raise BadRequest(
            "the multipart body cannot be read: the Content-Type has no boundary of 1 to 70 "
            "letters, digits and '()+_,-./:=?"
        )
    # Read as Latin-1, which keeps every byte as it came: of text that is not UTF-8 the parser
    # would make a guess, and of a charset in the header whatever Python has a codec for.
    as_it_came = f'multipart/form-data; boundary="{boundary}"; charset=latin-1'
    parser = MultiPartParser(
        Headers({"content-type": as_it_came}),
        request.stream(),
        max_files=MAX_FORM_FILES,
        max_fields=MAX_FORM_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise BadRequest(f"the multipart body cannot be read: {error.message}") from error


def _text(as_it_came: str, *, of: str) -> str:
    """UTF-8, whatever a header says, and else refused."""
    try:
        return as_it_came.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{of} is not UTF-8 text: {error.reason}") from error


def bad_request(error: ValidationError, model: type[Input]) -> BadRequest:
    """The first thing wrong, as one sentence with field, value and limit."""
    if error.error_count() > MAX_ERRORS:
        return BadRequest(
            f"the body has {error.error_count()} wrong or unknown fields; GET /docs lists the known"
        )
    first = error.errors(include_url=False)[0]
    where = cut(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, model.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return BadRequest(f"unknown field {where!r}{hint}", param=where, code="unknown_parameter")
    if first["type"] == "missing":
        return BadRequest(f"{where} is required", param=where, code="missing_required_parameter")
    if not where:
        return BadRequest(f"the body is not a JSON object of parameters: {first['msg']}")
    return BadRequest(f"{where} is {shown(first['input'])}: {plain(first['msg'])}", param=where)


def cut(name: str, max_chars: int = MAX_PARAM_CHARS) -> str:
    """A client's own text, no longer than a message or header should be made by it."""
    return name if len(name) <= max_chars else name[: max_chars - 3] + "..."


def shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, RecursionError):  # keys of bytes, a thousand lists in each other
        text = reprlib.repr(value)
    return cut(text, MAX_SHOWN_CHARS)


def plain(message: str) -> str:
    return message[:1].lower() + message[1:]


def accepted_format(accept: str, asked: str | None, formats: Mapping[str, F]) -> F | None:
    """The first format that ``Accept`` lists of ``formats``, by media type; None where it lists
    none, or JSON. ``asked`` is what the body asks for, None: nothing.

    Raises:
        BadRequest: another format is asked for in the body.
    """
    media_types = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    if "application/json" in media_types:
        return None
    wanted = next((formats[media] for media in media_types if media in formats), None)
    if None not in (wanted, asked) and asked != wanted:
        raise BadRequest(
            f"output_format is {asked!r} but the Accept header asks for {wanted!r}; "
            "send one of them",
            param="output_format",
        )
    return wanted


def with_accepted_format(accept: str, params: T) -> tuple[T, bool]:
    """The parameters in the image format that ``Accept`` asks for, if any, and whether one does:
    the answer is a bare image then, and else JSON.

    Only an explicit ``image/png``, ``image/jpeg`` or ``image/webp`` counts, the first one listed;
    ``*/*`` and ``application/json`` mean JSON.

    Raises:
        BadRequest: a raw body cannot carry several images, a URL or a stream, or two formats are
            asked.
    """
    formats: dict[str, OutputFormat] = {
        "image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp",
    }  # fmt: skip
    asked = params.output_format if "output_format" in params.model_fields_set else None
    wanted = accepted_format(accept, asked, formats)
    if wanted is None:
        return params, False
    if params.response_format == "url":
        raise BadRequest(
            f"response_format is 'url', but a raw image body ({accept}) is the image itself; ask "
            "for application/json",
            param="response_format",
        )
    if params.n != 1 or params.stream:
        what = f"n is {params.n}" if params.n != 1 else "stream is true"
        raise BadRequest(
            f"{what}, but a raw image body ({accept}) carries one image; ask for application/json",
            param="n" if params.n != 1 else "stream",
        )
    return params.model_copy(update={"output_format": wanted}), True
