"""From a parsed request to rows: the checks that need the model and the settings.

Everything a caller can get wrong is refused here, before anything is queued, with the field, the
value, the limit and the way out in the message.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from engines.drawing.drawing import Drawing
from engines.drawing.info import ModelInfo
from engines.drawing.runner import Runner
from engines.errors import InvalidInput
from engines.families.recipe import Blend, Recipe
from service.access.quota import Priority, Tenant
from service.errors import BadRequest, NotFound
from service.settings import Settings
from service.web.edits import start_of
from service.web.masks import Edited, Paste
from service.web.parsing import cut
from service.web.schema import MAX_SEED, DrawParams, ImageParams

MAX_IGNORED = 10  # unknown fields that are named: warnings of a raw image travel in its head
MAX_RANDOM_SEED = 2**32  # what other tools of the field can read back


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may be queued: its drawings, what was settled for it, and what to tell."""

    drawings: list[Drawing]
    width: int  # of what is sent: where a part was drawn, of the whole
    height: int
    num_steps: int
    timesteps: tuple[int, ...] | None
    guidance_scale: float
    sampler: str
    decoder: str
    loras: Mapping[str, float]
    seed: int
    priority: Priority
    warnings: list[str] = field(default_factory=list)
    paste: Paste | None = None  # over each image of an edit with a mask
    num_frames: int = 1  # of each drawing; more make it a clip

    @property
    def num_images(self) -> int:
        """What it counts for a key's limits: a clip is as many images as it has frames."""
        return len(self.drawings) * self.num_frames

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


def check_model(name: str | None, model_id: str, settings: Settings) -> None:
    """Raises `NotFound` unless ``name`` is this model, one of its aliases, or absent."""
    if name is not None and name not in (model_id, *settings.aliases):
        raise NotFound(
            f"model {name[:80]!r} is not served here; this service has {model_id!r} "
            "(GET /v1/models)",
            param="model",
            code="model_not_found",
        )


def admit(
    params: DrawParams,
    runner: Runner,
    settings: Settings,
    tenant: Tenant,
    edited: Edited | None = None,
    blends: tuple[Blend, ...] = (),
    num_frames: int = 1,
) -> Admitted:
    """Settle every open choice of a request and make its drawings. No engine call happens here.

    ``edited`` is what an edit starts from, as it was sent; ``blends``, what a prompt moves towards.
    A model of clips draws one of ``num_frames``, of which one is an image.

    Raises:
        BadRequest: a value this model or this service does not take.
    """
    info = runner.info
    width, height = _size(params.size, info, None if edited is None else edited.pixels)
    timesteps = None if params.timesteps is None else tuple(params.timesteps)
    num_steps = (
        params.num_inference_steps
        or len(timesteps or ())
        or steps_of_quality(params.quality, info.default_num_steps, settings.max_steps)
    )
    at_most("num_inference_steps", num_steps, settings.max_steps)
    guidance = params.guidance_scale
    guidance = info.default_guidance_scale if guidance is None else guidance
    sampler = params.sampler or info.default_sampler
    timesteps = timesteps or info.timesteps_for(sampler, num_steps)
    decoder = params.decoder or info.default_decoder
    loras = _loras(params, settings)
    seed = secrets.randbelow(MAX_RANDOM_SEED) if params.seed is None else params.seed
    start = start_of(params, edited, width, height)
    top_left = params.crops_coords_top_left
    drawings = []
    for index in range(params.num_rows):
        recipe = Recipe(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            prompt_weighting=params.prompt_weighting,
            width_px=width,
            height_px=height,
            seed=seed + index,
            num_steps=num_steps,
            timesteps=timesteps,
            guidance_scale=guidance,
            sampler=sampler,
            decoder=decoder,
            strength=start.strength,
            eta=params.eta,
            image=start.image,
            mask=start.mask,
            num_previews=params.num_previews,
            loras=loras,
            original_size=_height_width(params.original_size),
            crops_coords_top_left=None if top_left is None else (top_left[0], top_left[1]),
            target_size=_height_width(params.target_size),
            blends=blends,
            num_frames=num_frames,
        )
        try:
            drawings.append(runner.start(recipe))
        except InvalidInput as error:
            raise BadRequest(str(error), param=_API_NAMES.get(error.field, error.field)) from error
    warnings = _ignored(params) + _warnings(params, info, drawings[0], settings)
    if start.warning is not None:
        warnings.append(start.warning)
    priority = priority_of(params, tenant)
    if params.priority is not None and Priority[params.priority.upper()] != priority:
        warnings.append(
            f"priority is {params.priority!r}; this API key has {priority.name.lower()} at most"
        )
    if start.paste is not None:
        height, width, _ = start.paste.image.shape
    return Admitted(
        drawings, width, height, num_steps, timesteps, guidance, sampler, decoder, loras, seed,
        priority, warnings, start.paste, num_frames,
    )  # fmt: skip


def steps_of_quality(quality: str, default: int, max_steps: int) -> int:
    """``low``: half the model's default, rounded up; ``high``, ``hd``: twice, as far as allowed."""
    if quality == "low":
        return (default + 1) // 2
    if quality in ("high", "hd"):
        return max(default, min(2 * default, max_steps))
    return default


def priority_of(params: DrawParams, tenant: Tenant) -> Priority:
    """What was asked for, as far as the key allows it."""
    return tenant.allowed(None if params.priority is None else Priority[params.priority.upper()])


def _loras(params: DrawParams, settings: Settings) -> Mapping[str, float]:
    """Name → weight, as asked or as the service has it by default."""
    if params.loras is None:
        return settings.default_loras
    names = [lora.name for lora in params.loras]
    for name in names:
        if names.count(name) > 1:
            raise BadRequest(f"loras names {name!r} twice; give it one weight", param="loras")
    return {lora.name: lora.weight for lora in params.loras if lora.weight}


_API_NAMES = {"num_steps": "num_inference_steps", "width_px": "size", "height_px": "size"}


def at_most(name: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        raise BadRequest(f"{name} is {value}{unit}; at most {limit}{unit} are accepted", param=name)


def check_limits(params: DrawParams, settings: Settings) -> None:
    """Raise `BadRequest` for what needs no model to be seen wrong; before `admit`."""
    at_most("timesteps", len(params.timesteps or ()), settings.max_steps, " numbers")
    for name in ("prompt", "negative_prompt"):
        at_most(name, len(getattr(params, name) or ""), settings.max_prompt_chars, " characters")
    if not params.prompt.strip():
        raise BadRequest("prompt is blank; say what to draw", param="prompt")
    if isinstance(params, ImageParams):
        _check_image_limits(params, settings)


def _check_image_limits(params: ImageParams, settings: Settings) -> None:
    at_most("n", params.n, settings.max_images)
    if params.background == "transparent":
        raise BadRequest(
            "background is 'transparent'; this model draws opaque images, use 'opaque' or 'auto'",
            param="background",
        )
    if params.partial_images and not params.stream:
        raise BadRequest(
            f"partial_images is {params.partial_images} but stream is false; set stream to true",
            param="partial_images",
        )
    if params.seed is not None and params.seed + params.n - 1 > MAX_SEED:
        raise BadRequest(
            f"seed is {params.seed} and n is {params.n}; image k uses seed + k, which may be "
            f"{MAX_SEED} at most, send a smaller seed",
            param="seed",
        )
    if params.output_compression is not None and params.output_format == "png":
        raise BadRequest(
            f"output_compression is {params.output_compression} but output_format is 'png', which "
            "is lossless; use jpeg or webp, or leave it out",
            param="output_compression",
        )


def _size(size: str, info: ModelInfo, image: np.ndarray | None) -> tuple[int, int]:
    """Width and height; ``auto``: the model's own, for an edit the nearest to the input's.

    Nearest is of the same shape, but for the multiples that sides must be and for shapes that the
    limits of a side leave no room for.
    """
    step = info.size_multiple
    if size != "auto":
        width, height = (int(side) for side in size.split("x"))
    elif image is None:
        return info.default_width, info.default_height
    else:
        sides = (image.shape[1], image.shape[0])
        scale = min(max(1.0, info.min_size_px / min(sides)), info.max_size_px / max(sides))
        width, height = (
            min(max(round(side * scale / step) * step, info.min_size_px), info.max_size_px)
            for side in sides
        )
    for side in (width, height):
        if side % step or not info.min_size_px <= side <= info.max_size_px:
            raise BadRequest(
                f"size is {width}x{height}; width and height must be multiples of {step} from "
                f"{info.min_size_px} to {info.max_size_px}, for example "
                f"{info.default_width}x{info.default_height}",
                param="size",
            )
    return width, height


def _height_width(size: str | None) -> tuple[int, int] | None:
    """As diffusers has what the API says as ``WIDTHxHEIGHT``."""
    if size is None:
        return None
    width, height = map(int, size.split("x"))
    return height, width


def _ignored(params: DrawParams) -> list[str]:
    """A warning of each unknown field, where the service ignores them."""
    names = [cut(repr(name)) for name in params.unknown_fields()]
    found = [f"unknown field {name} was ignored" for name in names[:MAX_IGNORED]]
    if len(names) > MAX_IGNORED:
        found.append(f"{len(names) - MAX_IGNORED} more unknown fields were ignored")
    return found


def _warnings(
    params: DrawParams, info: ModelInfo, drawing: Drawing, settings: Settings
) -> list[str]:
    found = []
    texts = zip(("prompt", "negative_prompt"), drawing.num_truncated_tokens, strict=False)
    for name, num_lost in texts:  # a prompt that is drawn without guidance stands alone
        if not num_lost:
            continue
        room = f"the text encoder's window of {info.max_tokens}"
        if info.max_chunks > 1:
            room = f"{info.max_chunks} of the text encoder's windows of {info.max_tokens}"
        message = f"{name} is {num_lost} tokens longer than {room}"
        if settings.long_prompt == "refuse":
            raise BadRequest(f"{message}; shorten it", param=name, code="prompt_too_long")
        found.append(f"{message}; the end was left out")
    if params.negative_prompt and drawing.num_lanes == 1:
        reason = (
            "has its guidance built in" if info.guidance_embedding else "needs guidance above 1"
        )
        found.append(f"negative_prompt has no effect: this model {reason}")
    if info.stands_in and params.sampler is None:
        found.append(
            f"the checkpoint names {info.scheduler}; the sampler {info.default_sampler} stands in"
        )
    if isinstance(params, ImageParams) and params.response_format == "url" and params.stream:
        found.append("response_format has no effect on a stream: its events carry b64_json")
    found += [
        f"{name} has no effect on this service"
        for name in ("style", "moderation", "input_fidelity")
        if getattr(params, name, None) is not None
    ]
    return found
