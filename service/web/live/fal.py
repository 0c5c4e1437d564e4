"""The same session as fal's realtime clients speak it: a message is a picture with all its values.

Requests and answers have the fields of fal's latent consistency applications; what goes wrong is
their ``x-fal-error``, what was left out an ``x-fal-message``, which their clients pass over.
"""

from __future__ import annotations

import base64
import uuid
from typing import Any

import msgpack
import orjson

from service.errors import BadRequest
from service.web.live.messages import Frame, unpack
from service.web.parsing import shown

OWNER = "fourstep/"  # an application's name has one, a model's here need not
SIZES = {
    "square_hd": "1024x1024", "square": "512x512",
    "portrait_4_3": "768x1024", "portrait_16_9": "576x1024",
    "landscape_4_3": "1024x768", "landscape_16_9": "1024x576",
}  # fmt: skip
HOW = ("sync_mode", "enable_safety_checks", "enable_safety_checker")  # of no meaning here


class Fal:
    """Of a client that opened ``/MODEL/realtime``."""

    image, mask = "image_url", "mask_url"

    def __init__(self, model: str) -> None:
        self._model = model.removeprefix(OWNER)

    def read(self, data: bytes | str) -> Frame:
        given = unpack(data)
        ident = given.pop("request_id", None)
        if ident is None:
            ident = uuid.uuid4().hex
        elif not isinstance(ident, str) or len(ident) > 64:
            raise BadRequest(
                "request_id must be a text of at most 64 characters", param="request_id"
            )
        image, mask = given.pop(self.image, None), given.pop(self.mask, None)
        for name in HOW:
            given.pop(name, None)
        if given.pop("num_images", 1) != 1:
            raise BadRequest("num_images must be 1: a frame is one picture", param="num_images")
        if (size := given.pop("image_size", None)) is not None:
            given["size"] = _size(size)
        if (named := given.pop("format", None)) is not None:
            given["output_format"] = named
        values = {"model": self._model} | given
        return Frame(type="frame", id=ident, image=image, mask=mask, values=values)

    def write(self, message: dict[str, Any]) -> bytes | str:
        ident = message.get("id")
        match message["type"]:
            case "frame":
                return _picture(message)
            case "error":
                error = message["error"]
                said = {
                    "type": "x-fal-error", "error": error["code"] or error["type"],
                    "reason": error["message"], "request_id": ident,
                }  # fmt: skip
            case _:
                said = {"type": "x-fal-message", "action": message["type"], "request_id": ident}
        return orjson.dumps(said).decode()


def _picture(message: dict[str, Any]) -> bytes:
    media_type = message["media_type"]
    url = f"data:{media_type};base64,{base64.b64encode(message['image']).decode()}"
    size = {"width": message["width"], "height": message["height"]}
    answer = {
        "images": [{"url": url, "content_type": media_type, **size}],
        "timings": {name: ms / 1e3 for name, ms in message["timings"].items()},  # seconds
        "seed": message["seed"],
        "num_inference_steps": message["steps"],
        "has_nsfw_concepts": [False],  # what is withheld is an error
        "request_id": message["id"],
    }
    return msgpack.packb(answer)  # type: ignore[no-any-return]


def _size(given: object) -> str:
    match given:
        case str() if given in SIZES:
            return SIZES[given]
        case {"width": int(width), "height": int(height)}:
            return f"{width}x{height}"
    raise BadRequest(
        f"image_size is {shown(given)}; use one of {', '.join(SIZES)}, or an object with "
        "width and height",
        param="image_size",
    )
