"""Bodies to parameters: JSON and multipart, with OpenAI-shaped errors that name the field."""

from __future__ import annotations

import difflib
import json
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from service.errors import BadRequest
from service.schema import EditRequest, GenerationRequest, ImageParams, OutputFormat

P = TypeVar("P", bound=ImageParams)

NOT_YET = {  # OpenAI fields this service does not act on: refused, never silently dropped
    "mask": "inpainting is not served; leave mask out to redraw the whole image",
}
MAX_FORM_FIELDS = 64


async def parse_generation(request: Request) -> GenerationRequest:
    """The JSON body of ``POST /v1/images/generations``."""
    body = await request.body()
    try:
        return GenerationRequest.model_validate_json(body)
    except ValidationError as error:
        raise bad_request(error, GenerationRequest) from error


async def parse_edit(request: Request) -> tuple[EditRequest, bytes]:
    """The multipart body of ``POST /v1/images/edits``: parameters and the one image."""
    if "multipart/form-data" not in request.headers.get("content-type", ""):
        raise BadRequest("the body must be multipart/form-data with one file field `image`")
    try:
        form = await request.form(max_files=8, max_fields=MAX_FORM_FIELDS, max_part_size=2**20)
    except (MultiPartException, HTTPException) as error:
        detail = getattr(error, "message", None) or getattr(error, "detail", str(error))
        raise BadRequest(f"the multipart body cannot be read: {detail}") from error
    try:
        files = [*form.getlist("image"), *form.getlist("image[]")]
        if len(files) != 1 or not isinstance(files[0], UploadFile):
            raise BadRequest(
                f"image must be exactly one file, got {len(files)} parts", param="image"
            )
        data = await files[0].read()
        fields: dict[str, Any] = {}
        for key, value in form.multi_items():
            if key in ("image", "image[]"):
                continue
            if key in fields:
                raise BadRequest(f"{key} is given twice; send it once", param=key)
            fields[key] = value if isinstance(value, str) else "<file>"
    finally:
        await form.close()
    for name, reason in NOT_YET.items():
        if name in fields:
            raise BadRequest(reason, param=name, code="unsupported_parameter")
    try:
        return EditRequest.model_validate(fields), data
    except ValidationError as error:
        raise bad_request(error, EditRequest) from error


def bad_request(error: ValidationError, model: type[ImageParams]) -> BadRequest:
    """The first thing wrong, as one sentence with field, value and limit."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, model.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return BadRequest(f"unknown field {where!r}{hint}", param=where, code="unknown_parameter")
    if first["type"] == "missing":
        return BadRequest(f"{where} is required", param=where, code="missing_required_parameter")
    if not where:
        return BadRequest(f"the body is not a JSON object of parameters: {first['msg']}")
    value = json.dumps(first["input"], ensure_ascii=False, default=str)
    shown = value if len(value) <= 80 else value[:77] + "..."
    return BadRequest(f"{where} is {shown}: {_plain(first['msg'])}", param=where)


def _plain(message: str) -> str:
    return message[:1].lower() + message[1:]


def accepted_format(accept: str, params: ImageParams) -> OutputFormat | None:
    """The image format that ``Accept`` asks for as a raw body, or None for JSON.

    Only an explicit ``image/png``, ``image/jpeg`` or ``image/webp`` counts, the first one listed;
    ``*/*`` and ``application/json`` mean JSON.

    Raises:
        BadRequest: a raw body cannot carry several images or a stream, or two formats are asked.
    """
    media_types = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    if "application/json" in media_types:
        return None
    formats: dict[str, OutputFormat] = {
        "image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp",
    }  # fmt: skip
    wanted = next((formats[media] for media in media_types if media in formats), None)
    if wanted is None:
        return None
    if "output_format" in params.model_fields_set and params.output_format != wanted:
        raise BadRequest(
            f"output_format is {params.output_format!r} but the Accept header asks for {wanted!r}; "
            "send one of them",
            param="output_format",
        )
    if params.n != 1 or params.stream:
        what = f"n is {params.n}" if params.n != 1 else "stream is true"
        raise BadRequest(
            f"{what}, but a raw image body ({accept}) carries one image; ask for application/json",
            param="n" if params.n != 1 else "stream",
        )
    return wanted
