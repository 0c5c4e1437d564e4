"""The REST schema: OpenAI's Images API with our extensions as plain extra fields.

What the protocol itself fixes (types, enumerations, the bounds OpenAI documents) is declared here
and shown in ``/docs``; what depends on the model or on settings is checked in
`service.web.admission`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, from_json

from service.settings import DecoderName, SamplerName

OutputFormat = Literal["png", "jpeg", "webp"]
MAX_SEED = 2**63 - 1  # also of the last image, so that every seed returned can be sent again
Size = Annotated[str, StringConstraints(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")]
ToldSize = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]
Name = Annotated[str, StringConstraints(max_length=256)]  # longer than any that is served
Note = Annotated[str, StringConstraints(max_length=1024)]  # kept nowhere
FORM_EXAMPLES = {
    "loras": '[{"name": "...", "weight": 1.0}]',
    "timesteps": "[999, 749, 499, 249]",
    "crops_coords_top_left": "[0, 0]",
}
ABOUT = ("title", "description", "default")  # of a field's JSON schema: what says nothing of a type


def _whole(value: object) -> object:
    """JSON has one kind of number: 2.0 is an integer there."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_TIMESTEP = 99_999  # beyond any training
Timestep = Annotated[int, Field(ge=0, le=MAX_TIMESTEP), BeforeValidator(_whole)]
MAX_COORDINATE_PX = 99_999  # as far as a size goes
Coordinate = Annotated[int, Field(ge=0, le=MAX_COORDINATE_PX), BeforeValidator(_whole)]


class Input(BaseModel):
    """What a client sends: unknown fields are refused, and an optional one may be null."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    absent: ClassVar[tuple[object, ...]] = (None,)  # of an optional field: as if it were not there

    @model_validator(mode="before")
    @classmethod
    def _leave_out_absent(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {
            name: value
            for name, value in given.items()
            if name not in optional or value not in cls.absent
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """``X`` that may be left out is ``X | None`` to clients."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, typed in schema["properties"].items():
            if name in schema.get("required", ()) or "anyOf" in typed:
                continue
            about = {key: typed.pop(key) for key in ABOUT if key in typed}
            schema["properties"][name] = {"anyOf": [typed, {"type": "null"}]} | about
        return schema


class LoraChoice(Input):
    """One LoRA of a request."""

    name: Name = Field(description="As GET /v1/models lists it under `loras`.")
    weight: float = Field(1.0, ge=-4, le=4, description="Its share λ; 0 leaves it out.")


class DrawParams(Input):
    """What to draw and how: fields that images and clips share."""

    prompt: str = Field(min_length=1, description="What to draw. Any Unicode text.")
    model: Name | None = Field(None, description="Model id, as GET /v1/models lists it.")
    size: Size = Field(
        "auto",
        description="`WIDTHxHEIGHT` in pixels: of an image of another shape its centre is drawn "
        "from. `auto`: the model's own; with an image the nearest to its own, all of it scaled.",
    )
    user: Note | None = Field(None, description="Free text for the caller's own records.")
    safety_identifier: Note | None = Field(None, description="As `user`.")

    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] = Field(
        "auto",
        description="Without num_inference_steps and timesteps: low draws half the model's default "
        "steps, rounded up, high and hd draw twice as many, or as many as this service takes.",
    )
    num_inference_steps: int | None = Field(None, ge=1, description="Denoise calls per image.")
    timesteps: list[Timestep] | None = Field(
        None,
        min_length=1,
        description="Training timesteps to draw at, descending, one for each step; not with every "
        "sampler. Default: the sampler spaces num_inference_steps of them.",
    )
    guidance_scale: float | None = Field(None, ge=0, le=50, description="Guidance weight.")
    negative_prompt: str | None = Field(None, description="What to keep out of the picture.")
    prompt_weighting: bool = Field(
        False,
        description="Whether `(word)`, `(word:1.3)` and `[word]` in prompt and negative_prompt are "
        "weights; `\\(` is the character then. Otherwise brackets are text as any other.",
    )
    original_size: ToldSize | None = Field(
        None,
        description="`WIDTHxHEIGHT` in pixels that the picture is said to have had. This and the "
        "next two: SDXL's size conditioning, refused by models without. Default: what is drawn.",
    )
    crops_coords_top_left: list[Coordinate] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="`[top, left]` in pixels at which it is said to have been cropped. "
        "Default: `[0, 0]`.",
    )
    target_size: ToldSize | None = Field(
        None, description="`WIDTHxHEIGHT` that it is said to have been cut to, as original_size."
    )
    seed: int | None = Field(
        None, ge=0, lt=MAX_SEED + 1, description="Of the first image; image k uses seed + k."
    )
    sampler: SamplerName | None = Field(None, description="Default: the checkpoint's own.")
    eta: float | None = Field(
        None, ge=0, le=1, description="Stochasticity of DDIM (default 0) and TCD (default 0.3)."
    )
    decoder: DecoderName | None = Field(
        None,
        description="What makes pixels of latents, and latents of an image that is given: the "
        "model's own VAE or a tiny one, sooner and less exactly, where GET /v1/models lists it "
        "under `decoders`.",
    )
    loras: list[LoraChoice] | None = Field(
        None, max_length=8, description="LoRAs to draw with; default: those the service names."
    )
    priority: Literal["low", "normal", "high"] | None = Field(
        None, description="Higher goes first. At most, and by default, what the API key has."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_whole(cls, value: object) -> object:
        return _whole(value)

    @property
    def num_rows(self) -> int:
        """Images or clips, each a row of its own."""
        return 1

    @property
    def num_previews(self) -> int:
        """Of each row."""
        return 0

    def unknown_fields(self) -> Iterator[str]:
        """Dotted names of what is no field; there are some only where the service ignores them."""
        return _unknown_fields(self)


def _unknown_fields(model: BaseModel) -> Iterator[str]:
    yield from model.model_extra or ()
    for name in type(model).model_fields:
        if isinstance(values := getattr(model, name), list):
            for index, value in enumerate(values):
                if not isinstance(value, BaseModel):
                    continue
                yield from (f"{name}.{index}.{below}" for below in _unknown_fields(value))


class ImageParams(DrawParams):
    """Fields that generations and edits share."""

    n: int = Field(1, ge=1, le=10, description="Number of images; each has its own seed.")
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="`url`: the image is kept for a while, for whoever has the URL."
    )
    output_format: OutputFormat = Field("png", description="Encoding of the image.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp, in percent (default 90)."
    )
    background: Literal["auto", "opaque", "transparent"] = Field(
        "auto", description="Images are opaque; `transparent` is refused."
    )
    stream: bool = Field(False, description="Answer as server-sent events.")
    partial_images: int = Field(
        0, ge=0, le=3, description="Previews per image, when streaming; fewer when steps are few."
    )
    moderation: Literal["auto", "low"] | None = Field(
        None, description="Has no effect: whether a safety filter looks is the service's setting."
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="Has no effect here.")

    @property
    def num_rows(self) -> int:
        return self.n

    @property
    def num_previews(self) -> int:
        return self.partial_images if self.stream else 0


class GenerationRequest(ImageParams):
    """``POST /v1/images/generations``."""


class EditParams(ImageParams):
    """``POST /v1/images/edits``: image-to-image, and inpainting where there is a mask."""

    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="How far from the input: 1 keeps nothing of it. Default: 0.8, with a mask 1.",
    )
    paste_back: bool = Field(
        True, description="What a mask keeps of the image is put back, equal to the byte."
    )
    padding_mask_crop: int | None = Field(
        None,
        ge=0,
        le=4096,
        description="With a mask: just what it marks and so many pixels around are drawn, at the "
        "full `size`, and put back into the image, which keeps its own.",
    )
    mask_feather: int | None = Field(
        None,
        ge=0,
        le=256,
        description="Pixels inside the mask's edge over which what is put back fades out. "
        "Default: a 128th of the shorter side.",
    )
    input_fidelity: Literal["high", "low"] | None = Field(None, description="Has no effect here.")


class FormParams(DrawParams):
    """What comes as a form: scalars are text, and a field that was left blank is absent."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)
    absent = (None, "")  # an HTML form sends every field, one that was left blank as ""

    @field_validator(*FORM_EXAMPLES, mode="before")
    @classmethod
    def _from_form(cls, value: object, info: ValidationInfo) -> object:
        """A form carries a list as JSON text."""
        try:
            return from_json(value) if isinstance(value, str) else value
        except ValueError:
            raise ValueError(f"write it as JSON, {FORM_EXAMPLES[info.field_name or '']}") from None


class EditRequest(EditParams, FormParams):
    """An edit as a form, its image a file."""


class ImageReference(Input):
    """One image of an edit's ``images``."""

    image_url: str | None = Field(
        None, description="A `data:` URL in base64. Images elsewhere are not fetched."
    )
    file_id: str | None = Field(None, description="Refused: this service keeps no uploads.")


class EditBody(EditParams):
    """An edit as JSON, its image in ``image`` or in ``images``."""

    image: str | None = Field(None, description="In base64, bare or as a `data:` URL.")
    images: list[ImageReference] | None = Field(
        None, max_length=16, description="OpenAI's form of the same; exactly one is taken."
    )
    mask: ImageReference | None = Field(
        None,
        description="What is transparent in it is drawn anew; without a mask, what is transparent "
        "in the image itself, else all of it.",
    )


class ImageObject(BaseModel):
    """One image of an answer."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    filtered: Literal[True] | None = Field(
        None, description="The safety filter withheld this image: it is black. Absent otherwise."
    )
    cached: Literal[True] | None = Field(
        None, description="Drawn for an earlier request with the same seed. Absent otherwise."
    )


class ImagesResponse(BaseModel):
    """The answer to generations and edits. ``timings`` are milliseconds on the server."""

    created: int
    data: list[ImageObject]
    model: str
    size: str
    quality: str
    background: str = "opaque"
    output_format: OutputFormat
    num_inference_steps: int
    timesteps: list[int] | None = Field(description="Null: as the sampler spaces them.")
    guidance_scale: float
    sampler: str
    decoder: str
    loras: dict[str, float]
    timings: dict[str, float]
    warnings: list[str]


class ImageEvent(BaseModel):
    """What every server-sent event with an image carries."""

    b64_json: str
    created_at: int
    image_index: int = Field(description="Of the request's `n` images.")
    seed: int
    size: str
    quality: str
    background: str
    output_format: OutputFormat


class PartialImageEvent(ImageEvent):
    """A preview: the image as it looks so far."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class CompletedEvent(ImageEvent):
    """A finished image."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    timings: dict[str, float]
    warnings: list[str]
    filtered: Literal[True] | None = Field(None, description="As of an ImageObject.")
    cached: Literal[True] | None = Field(None, description="As of an ImageObject.")


class ModelObject(BaseModel):
    """One entry of ``GET /v1/models``, with what a caller may ask of it."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fourstep"
    details: dict[str, Any]


class ModelList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorBody
