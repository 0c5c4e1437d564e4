"""The OpenAPI document: what FastAPI cannot see of handlers that read their own bodies.

Request bodies with this service's own limits, raw images, event streams, errors, headers, keys.
It describes the service as it runs: where no key is needed, none is spoken of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from service.access.keys import IMAGE_FILES, PROTECTED
from service.errors import (
    BadRequest,
    BodyTimeout,
    DeadlineExceeded,
    EngineFailure,
    MethodNotAllowed,
    NotFound,
    NotReady,
    Overloaded,
    ServiceError,
    TooLarge,
    Unauthorized,
)
from service.settings import MIN_TIMEOUT_S, Settings
from service.web.images import MEDIA_TYPES
from service.web.schema import (
    CompletedEvent,
    EditBody,
    EditRequest,
    ErrorResponse,
    GenerationRequest,
    PartialImageEvent,
)

Object = dict[str, Any]

REF = "#/components/schemas/{model}"
ERROR = {"application/json": {"schema": {"$ref": REF.format(model=ErrorResponse.__name__)}}}
DRAWING_ERRORS = (
    BadRequest,
    NotFound,
    MethodNotAllowed,
    BodyTimeout,
    TooLarge,
    Overloaded,
    EngineFailure,
    NotReady,
    DeadlineExceeded,
)
EMPTY: Object = {"type": "string", "maxLength": 0}
REQUEST_ID = {"X-Request-ID": {"schema": {"type": "string"}, "description": "Stands in every log."}}
RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}}


def complete_document(
    app: FastAPI, settings: Settings, *describe: Callable[[Object], None]
) -> None:
    """Make ``app.openapi()`` (and so ``/openapi.json`` and ``/docs``) the whole truth; each of
    ``describe`` adds to the document what it knows of its own paths.
    """
    plain = app.openapi

    def openapi() -> Object:
        if app.openapi_schema is None:
            document = plain()
            _complete(document, settings)
            for each in describe:
                each(document)
            _add_what_all_have(document, settings)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _complete(document: Object, settings: Settings) -> None:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    requests = (GenerationRequest, EditRequest, EditBody)
    for model in (*requests, PartialImageEvent, CompletedEvent, ErrorResponse):
        schemas |= schemas_of(model)
    for model in requests:
        set_limits(schemas[model.__name__]["properties"], settings)
    schemas["EditForm"] = _edit_form(schemas.pop(EditRequest.__name__))

    paths = document["paths"]
    generations = paths["/v1/images/generations"]["post"]
    edits = paths["/v1/images/edits"]["post"]
    generations["requestBody"] = body_of("application/json", GenerationRequest.__name__)
    edits["requestBody"] = body_of("multipart/form-data", "EditForm")
    edits["requestBody"]["content"] |= body_of("application/json", EditBody.__name__)["content"]
    for operation, event_name in ((generations, "image_generation"), (edits, "image_edit")):
        operation["parameters"] = drawing_parameters(settings.request_timeout_s)
        _add_image_answers(operation["responses"]["200"], event_name)
        add_errors(operation, *DRAWING_ERRORS)
    add_errors(paths["/v1/models"]["get"], EngineFailure)
    add_errors(paths["/v1/models/{model_id}"]["get"], NotFound, EngineFailure)
    add_errors(paths["/readyz"]["get"], NotReady)
    file = paths[f"{IMAGE_FILES}{{name}}"]["get"]
    file["responses"]["200"]["content"] = _images()
    add_errors(file, NotFound, EngineFailure)
    for operation in (paths["/v1/models/{model_id}"]["get"], file):
        operation["responses"].pop("422", None)  # any text is a name


def _add_what_all_have(document: Object, settings: Settings) -> None:
    paths = document["paths"]
    if settings.api_keys_file:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in paths.items():
            if path.startswith(PROTECTED) and not path.startswith(IMAGE_FILES):
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
                    add_errors(operation, Unauthorized)
    for operations in paths.values():
        for operation in operations.values():
            for answer in operation["responses"].values():
                answer["headers"] = REQUEST_ID | answer.get("headers", {})


def schemas_of(model: type[BaseModel]) -> Object:
    """The model's own, and those it refers to, by name."""
    schema = model.model_json_schema(ref_template=REF)
    return {**schema.pop("$defs", {}), model.__name__: schema}


def set_limits(properties: Object, settings: Settings) -> None:
    """This service's own limits, where they are narrower than the protocol's."""
    if "n" in properties:
        typed_part(properties["n"])["maximum"] = settings.max_images
    typed_part(properties["num_inference_steps"])["maximum"] = settings.max_steps
    typed_part(properties["timesteps"])["maxItems"] = settings.max_steps
    for name in ("prompt", "negative_prompt"):
        typed_part(properties[name])["maxLength"] = settings.max_prompt_chars


def typed_part(schema: Object) -> Object:
    """The part of ``X | None`` that says what X is."""
    typed: Object = next(
        (each for each in schema.get("anyOf", ()) if each.get("type") != "null"), schema
    )
    return typed


def as_form(schema: Object) -> Object:
    """``schema`` as a form has it: null is an empty field, a list is JSON text."""
    for each in schema["properties"].values():
        typed = _as_text(typed_part(each))
        if "enum" in typed:
            each.pop("anyOf", None)
            each |= typed | {"enum": [*typed["enum"], ""]}
        elif "anyOf" in each:
            each["anyOf"] = [typed, EMPTY]
    return schema


def _edit_form(schema: Object) -> Object:
    """A form with files."""
    properties = as_form(schema)["properties"]
    file = {"type": "string", "format": "binary"}
    properties["mask"] = file | {
        "description": "A file of the image's size: what is transparent in it is drawn anew."
    }
    properties["image"] = file | {
        "description": "One PNG, JPEG or WebP file; `image[]` is taken as well. Without a mask, "
        "what is transparent in it is drawn anew.",
    }
    return schema | {"required": ["image", *schema["required"]]}


def _as_text(typed: Object) -> Object:
    """How a form has what is no scalar."""
    if typed.get("type") != "array":
        return typed
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": typed}


def body_of(media_type: str, model: str) -> Object:
    """A request's, of a schema by that name."""
    content = {media_type: {"schema": {"$ref": REF.format(model=model)}}}
    return {"required": True, "content": content}


def drawing_parameters(longest_s: float) -> list[Object]:
    """Headers of a request that may take so many seconds."""
    return [
        {
            "name": "X-Request-Timeout",
            "in": "header",
            "description": "Seconds after which the request is given up, with a 504.",
            "schema": {
                "type": "number",
                "minimum": MIN_TIMEOUT_S,
                "maximum": longest_s,
                "default": longest_s,
            },
        },
        {
            "name": "X-Request-ID",
            "in": "header",
            "description": "1 to 128 visible ASCII characters, returned; others are replaced.",
            "schema": {"type": "string"},
        },
    ]


def _images() -> Object:
    binary = {"schema": {"type": "string", "format": "binary"}}
    return dict.fromkeys(MEDIA_TYPES.values(), binary)


def _add_image_answers(answer: Object, event_name: str) -> None:
    answer["description"] = (
        "JSON; the bare image where `Accept` names its media type; "
        "events, the last of them `[DONE]`, with `stream`."
    )
    answer["content"] |= _images()
    events: Mapping[str, str] = {
        f"{event_name}.partial_image": PartialImageEvent.__name__,
        f"{event_name}.completed": CompletedEvent.__name__,
        "error": ErrorResponse.__name__,
    }
    items: list[Object] = [
        {
            "properties": {
                "event": {"const": name},
                "data": {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "contentSchema": {"$ref": REF.format(model=model)},
                },
            },
            "required": ["event", "data"],
        }
        for name, model in events.items()
    ]
    items.append({"properties": {"data": {"const": "[DONE]"}}, "required": ["data"]})
    answer["content"]["text/event-stream"] = {"itemSchema": {"type": "object", "anyOf": items}}
    answer["headers"] = {
        name: {"schema": {"type": "string"}, "description": description}
        for name, description in {
            "Server-Timing": "Milliseconds by stage; not of event streams.",
            "X-Fourstep-Seed": "Of a bare image.",
            "X-Fourstep-Warnings": "Of a bare image: what had no effect or was changed.",
            "X-Fourstep-Cached": "Of a bare image: `true` where it was not drawn anew.",
        }.items()
    }


def add_errors(operation: Object, *errors: type[ServiceError]) -> None:
    """What else it answers."""
    for error in errors:
        about = (error.__doc__ or "").splitlines()[0]
        answer: Object = {"description": about, "content": ERROR}
        if error in (BodyTimeout, Overloaded, NotReady):
            answer["headers"] = RETRY_AFTER
        operation["responses"][str(error.status)] = answer
