"""The body of ``POST /v1/videos``: a form, as OpenAI's client sends it, or JSON."""

from __future__ import annotations

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from service.errors import BadRequest
from service.settings import Settings
from service.web.parsing import (
    JSON,
    accepted_format,
    bad_request,
    check_charset,
    check_plain,
    content_type,
    extra_of,
    from_json,
    max_json_bytes,
    read_body,
    read_form,
    sort_parts,
)
from service.web.videos.clips import CLIP_MEDIA_TYPES, ClipFormat
from service.web.videos.schema import VideoForm, VideoParams, VideoRequest

REFERENCE = "input_reference"


async def parse_video(request: Request, settings: Settings) -> VideoParams:
    """The parameters.

    Raises:
        BadRequest: a field is wrong, or a picture to start from is given.
    """
    check_plain(request)
    media_type, options = content_type(request, default=JSON)
    if media_type == JSON:
        check_charset(options)
        body = await read_body(request, max_json_bytes(settings.max_prompt_chars))
        params = from_json(body, VideoRequest, settings)
        if params.input_reference is not None:
            raise _no_reference()
        return params
    form = await read_form(request)
    try:
        fields, _ = sort_parts(_without_reference(form), settings, VideoForm, {})
    finally:
        await form.close()
    try:
        return VideoForm.model_validate(fields, extra=extra_of(settings))
    except ValidationError as error:
        raise bad_request(error, VideoForm) from error


def _without_reference(form: FormData) -> FormData:
    """Without fields of a reference that are empty. OpenAI's client writes a reference object as
    ``input_reference[image_url]``.
    """
    rest = []
    for name, value in form.multi_items():
        if name != REFERENCE and not name.startswith(f"{REFERENCE}["):
            rest.append((name, value))
        elif value.size if isinstance(value, UploadFile) else value:
            raise _no_reference()
    return FormData(rest)


def _no_reference() -> BadRequest:
    return BadRequest(
        "input_reference is given; clips are drawn from text alone here, leave it out (POST "
        "/v1/images/edits draws pictures from pictures, with a model that does)",
        param=REFERENCE,
        code="unsupported_parameter",
    )


def accepted_clip(accept: str, params: VideoParams) -> tuple[VideoParams, bool]:
    """The parameters in the format that ``Accept`` asks for, if any, and whether one does: the
    answer is the clip itself then, and else a job.

    Only an explicit ``video/mp4``, ``image/webp`` or ``image/gif`` counts, the first one listed;
    ``*/*`` and ``application/json`` mean a job.

    Raises:
        BadRequest: another format is asked for in the body.
    """
    formats: dict[str, ClipFormat] = {media: name for name, media in CLIP_MEDIA_TYPES.items()}
    asked = params.output_format if "output_format" in params.model_fields_set else None
    wanted = accepted_format(accept, asked, formats)
    if wanted is None:
        return params, False
    return params.model_copy(update={"output_format": wanted}), True
