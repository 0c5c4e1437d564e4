"""What the OpenAPI document says of clips."""

from __future__ import annotations

from service.errors import BadRequest, EngineFailure, NotFound
from service.replica import Replica
from service.web.openapi import (
    DRAWING_ERRORS,
    Object,
    add_errors,
    as_form,
    body_of,
    drawing_parameters,
    schemas_of,
    set_limits,
    typed_part,
)
from service.web.videos.clips import CLIP_MEDIA_TYPES
from service.web.videos.routes import PATH
from service.web.videos.schema import Video, VideoDeleted, VideoForm, VideoList, VideoRequest

BINARY = {"schema": {"type": "string", "format": "binary"}}


def describe_videos(document: Object, replica: Replica) -> None:
    """Complete the paths; where the model draws no clips, there are none."""
    paths, schemas = document["paths"], document["components"]["schemas"]
    if replica.started and not replica.runner.info.draws_clips:
        for path in [path for path in paths if path.startswith(PATH)]:
            del paths[path]
        for answer in (Video, VideoList, VideoDeleted):
            schemas.pop(answer.__name__, None)
        return
    for model in (VideoRequest, VideoForm):
        schemas |= schemas_of(model)
        properties = schemas[model.__name__]["properties"]
        set_limits(properties, replica.settings)
        if replica.started:
            typed_part(properties["num_frames"])["maximum"] = replica.runner.info.max_num_frames
    schemas[VideoForm.__name__] = as_form(schemas[VideoForm.__name__])
    one, content = f"{PATH}/{{video_id}}", f"{PATH}/{{video_id}}/content"
    create = paths[PATH]["post"]
    create["requestBody"] = body_of("multipart/form-data", VideoForm.__name__)
    create["requestBody"]["content"] |= body_of("application/json", VideoRequest.__name__)[
        "content"
    ]
    create["parameters"] = drawing_parameters(replica.settings.video_timeout_s)
    done = create["responses"]["200"]
    done["description"] = "The job; the clip itself where `Accept` names its media type."
    done["content"] |= dict.fromkeys(CLIP_MEDIA_TYPES.values(), BINARY)
    done["headers"] = {
        name: {"schema": {"type": "string"}, "description": description}
        for name, description in {
            "Server-Timing": "Of the clip itself: milliseconds by stage.",
            "X-Fourstep-Seed": "Likewise.",
            "X-Fourstep-Warnings": "Likewise: what had no effect or was changed.",
        }.items()
    }
    add_errors(create, *DRAWING_ERRORS)
    paths[content]["get"]["responses"]["200"]["content"] = dict.fromkeys(
        CLIP_MEDIA_TYPES.values(), BINARY
    )
    for path, method, errors in (
        (PATH, "get", (BadRequest, EngineFailure)),
        (one, "get", (NotFound, EngineFailure)),
        (one, "delete", (NotFound, EngineFailure)),
        (content, "get", (BadRequest, NotFound, EngineFailure)),
    ):
        add_errors(paths[path][method], *errors)
        paths[path][method]["responses"].pop("422", None)  # OpenAI's errors are 400
