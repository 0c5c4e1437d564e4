"""Every field of every endpoint, given wrong values: the exact error, word for word.

A field of the schema without a row here fails the test.
"""

from __future__ import annotations

import base64
import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from service.web.parsing import max_json_bytes
from service.web.schema import (
    EditBody,
    EditRequest,
    GenerationRequest,
    ImageReference,
    LoraChoice,
)

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
MAX_BODY_BYTES = 200_000
DEEP = json.loads("[" * 50 + "]" * 50)

STRING = "input should be a valid string"
INTEGER = "input should be a valid integer"
NUMBER = "input should be a valid number"
FINITE = "input should be a finite number"
BOOLEAN = "input should be a valid boolean"
SIZE = "string should match pattern '^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$'"
TOLD_SIZE = "string should match pattern '^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$'"
NO_SIZES = "this model has no size conditioning, leave it out"
DECODERS = "input should be 'full' or 'tiny'"
NO_TINY_VAE = "tiny-lcm is loaded with full; --tiny-vae gives it a tiny one"
SIDES = "width and height must be multiples of 8 from 32 to 128, for example 64x64"


@pytest.fixture(scope="module")
def http(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[TestClient]:
    values = {
        "model": str(lcm_checkpoint),
        "engine": "onnxruntime",
        "cache_dir": cache_dir,
        "max_body_bytes": MAX_BODY_BYTES,
        "max_input_px": 100 * 100,
        "max_images": 4,
        "max_steps": 20,
        "max_prompt_chars": 500,
        "long_prompt": "refuse",
    }
    with TestClient(build_app(Replica(load_settings(values)))) as client:
        yield client


def assert_error(
    answer: httpx.Response,
    message: str,
    param: str | None = None,
    code: str = "invalid_value",
    status: int = 400,
    kind: str = "invalid_request_error",
) -> None:
    assert answer.headers["content-type"] == "application/json"
    error = {"message": message, "type": kind, "param": param, "code": code}
    assert (answer.status_code, answer.json()) == (status, {"error": error})


def one_of(*names: str) -> str:
    quoted = [repr(name) for name in names]
    return f"input should be {', '.join(quoted[:-1])} or {quoted[-1]}"


FORMATS = one_of("png", "jpeg", "webp")
QUALITIES = one_of("auto", "low", "medium", "high", "standard", "hd")
PRIORITIES = "input should be 'low', 'normal' or 'high'"
SAMPLERS = one_of("lcm", "ddim", "euler", "euler_ancestral", "tcd", "dpmpp_2m", "dpmpp_2m_sde")
BACKGROUNDS = one_of("auto", "opaque", "transparent")

# Field → wrong values as JSON, each with the whole message.
JSON_FIELDS: dict[str, list[tuple[Any, str]]] = {
    "prompt": [
        (None, f"prompt is null: {STRING}"),
        (5, f"prompt is 5: {STRING}"),
        (["x"], f'prompt is ["x"]: {STRING}'),
        ({"a": 1}, f'prompt is {{"a": 1}}: {STRING}'),
        (DEEP, f"prompt is {'[' * 50}{']' * 27}...: {STRING}"),
        ("", 'prompt is "": string should have at least 1 character'),
        (" \n\t", "prompt is blank; say what to draw"),
        ("x" * 501, "prompt is 501 characters; at most 500 characters are accepted"),
        ("🎨" * 501, "prompt is 501 characters; at most 500 characters are accepted"),
    ],
    "prompt_weighting": [
        ("yes", f'prompt_weighting is "yes": {BOOLEAN}'),
        (1, f"prompt_weighting is 1: {BOOLEAN}"),
    ],
    "model": [
        (5, f"model is 5: {STRING}"),
        ("m" * 257, f'model is "{"m" * 76}...: string should have at most 256 characters'),
    ],
    "n": [
        (0, "n is 0: input should be greater than or equal to 1"),
        (11, "n is 11: input should be less than or equal to 10"),
        (5, "n is 5; at most 4 are accepted"),
        (1.5, f"n is 1.5: {INTEGER}"),
        ("2", f'n is "2": {INTEGER}'),
        (True, f"n is true: {INTEGER}"),
        (float("nan"), f"n is NaN: {INTEGER}"),
        (10**30, f"n is {10**30}: input should be less than or equal to 10"),
    ],
    "size": [
        (64, f"size is 64: {STRING}"),
        ("", f'size is "": {SIZE}'),
        ("64", f'size is "64": {SIZE}'),
        ("0x64", f'size is "0x64": {SIZE}'),
        ("64x-64", f'size is "64x-64": {SIZE}'),
        ("64X64", f'size is "64X64": {SIZE}'),
        ("64x64\n", f'size is "64x64\\n": {SIZE}'),
        ("6٤x64", f'size is "6٤x64": {SIZE}'),
        ("100000x64", f'size is "100000x64": {SIZE}'),
        ("60x64", f"size is 60x64; {SIDES}"),
        ("64x24", f"size is 64x24; {SIDES}"),
        ("64x136", f"size is 64x136; {SIDES}"),
        ("99999x99999", f"size is 99999x99999; {SIDES}"),
    ],
    "response_format": [
        ("png", f'response_format is "png": {one_of("b64_json", "url")}'),
    ],
    "output_format": [
        ("gif", f'output_format is "gif": {FORMATS}'),
        ("PNG", f'output_format is "PNG": {FORMATS}'),
    ],
    "output_compression": [
        (101, "output_compression is 101: input should be less than or equal to 100"),
        (-1, "output_compression is -1: input should be greater than or equal to 0"),
        (50.5, f"output_compression is 50.5: {INTEGER}"),
        (
            50,
            "output_compression is 50 but output_format is 'png', which is lossless; use jpeg or "
            "webp, or leave it out",
        ),
    ],
    "quality": [
        ("best", f'quality is "best": {QUALITIES}'),
    ],
    "background": [
        ("blue", f'background is "blue": {BACKGROUNDS}'),
        (
            "transparent",
            "background is 'transparent'; this model draws opaque images, use 'opaque' or 'auto'",
        ),
    ],
    "stream": [("true", f'stream is "true": {BOOLEAN}'), (1, f"stream is 1: {BOOLEAN}")],
    "partial_images": [
        (-1, "partial_images is -1: input should be greater than or equal to 0"),
        (4, "partial_images is 4: input should be less than or equal to 3"),
        (2, "partial_images is 2 but stream is false; set stream to true"),
    ],
    "user": [
        (5, f"user is 5: {STRING}"),
        ("u" * 1025, f'user is "{"u" * 76}...: string should have at most 1024 characters'),
    ],
    "safety_identifier": [
        (5, f"safety_identifier is 5: {STRING}"),
        (
            "u" * 1025,
            f'safety_identifier is "{"u" * 76}...: string should have at most 1024 characters',
        ),
    ],
    "moderation": [("high", f'moderation is "high": {one_of("auto", "low")}')],
    "style": [("bold", f'style is "bold": {one_of("vivid", "natural")}')],
    "num_inference_steps": [
        (0, "num_inference_steps is 0: input should be greater than or equal to 1"),
        (21, "num_inference_steps is 21; at most 20 are accepted"),
        (2.5, f"num_inference_steps is 2.5: {INTEGER}"),
        (10**20, f"num_inference_steps is {10**20}; at most 20 are accepted"),
    ],
    "timesteps": [
        (800, "timesteps is 800: input should be a valid array"),
        ("[800]", 'timesteps is "[800]": input should be a valid array'),
        ([], "timesteps is []: list should have at least 1 item after validation, not 0"),
        ([499, 999], "timesteps is [499, 999]; each must be below the one before it, the noisiest "
                     "is first"),
        ([499, 499], "timesteps is [499, 499]; each must be below the one before it, the noisiest "
                     "is first"),
        ([1000], "timesteps is [1000]; each must be from 0 to 999, the training's last"),
        ([*range(20, -1, -1)], "timesteps is 21 numbers; at most 20 numbers are accepted"),
    ],
    "guidance_scale": [
        (-0.1, "guidance_scale is -0.1: input should be greater than or equal to 0"),
        (50.1, "guidance_scale is 50.1: input should be less than or equal to 50"),
        ("7", f'guidance_scale is "7": {NUMBER}'),
        (float("nan"), f"guidance_scale is NaN: {FINITE}"),
        (float("inf"), f"guidance_scale is Infinity: {FINITE}"),
        (float("-inf"), f"guidance_scale is -Infinity: {FINITE}"),
    ],
    "negative_prompt": [
        (5, f"negative_prompt is 5: {STRING}"),
        ("x" * 501, "negative_prompt is 501 characters; at most 500 characters are accepted"),
    ],
    "original_size": [
        (512, f"original_size is 512: {STRING}"),
        ("auto", f'original_size is "auto": {TOLD_SIZE}'),
        ("0x64", f'original_size is "0x64": {TOLD_SIZE}'),
        ("1024x768", f"original_size is 1024x768; {NO_SIZES}"),
    ],
    "crops_coords_top_left": [
        ("0,0", 'crops_coords_top_left is "0,0": input should be a valid array'),
        ([8], "crops_coords_top_left is [8]: list should have at least 2 items after validation, "
              "not 1"),
        ([0, 8, 16], "crops_coords_top_left is [0, 8, 16]: list should have at most 2 items after "
                     "validation, not 3"),
        ([0, 0], f"crops_coords_top_left is [0, 0]; {NO_SIZES}"),
    ],
    "target_size": [
        ("64 x 64", f'target_size is "64 x 64": {TOLD_SIZE}'),
        ("100000x1", f'target_size is "100000x1": {TOLD_SIZE}'),
        ("1024x768", f"target_size is 1024x768; {NO_SIZES}"),
    ],
    "seed": [
        (-1, "seed is -1: input should be greater than or equal to 0"),
        (2**63, f"seed is {2**63}: input should be less than {2**63}"),
        (1.5, f"seed is 1.5: {INTEGER}"),
        ("7", f'seed is "7": {INTEGER}'),
    ],
    "sampler": [("heun", f'sampler is "heun": {SAMPLERS}')],
    "decoder": [
        ("taesd", f'decoder is "taesd": {DECODERS}'),
        ("tiny", f"decoder is 'tiny'; {NO_TINY_VAE}"),
    ],
    "priority": [("urgent", f'priority is "urgent": {PRIORITIES}')],
    "eta": [
        (1.1, "eta is 1.1: input should be less than or equal to 1"),
        (-0.1, "eta is -0.1: input should be greater than or equal to 0"),
        (float("nan"), f"eta is NaN: {FINITE}"),
    ],
    "loras": [
        ("ink", 'loras is "ink": input should be a valid array'),
        ({}, "loras is {}: input should be a valid array"),
        ([{"name": "ink"}], "loras names 'ink'; served with this model: none"),
    ],
}  # fmt: skip
LORA_FIELDS: dict[str, list[tuple[Any, str]]] = {
    "name": [
        (5, f"loras.0.name is 5: {STRING}"),
        ("l" * 257, f'loras.0.name is "{"l" * 76}...: string should have at most 256 characters'),
    ],
    "weight": [
        (5, "loras.0.weight is 5: input should be less than or equal to 4"),
        (-4.5, "loras.0.weight is -4.5: input should be greater than or equal to -4"),
        ("1", f'loras.0.weight is "1": {NUMBER}'),
        (float("inf"), f"loras.0.weight is Infinity: {FINITE}"),
    ],
}
TIMESTEPS: list[tuple[Any, str]] = [
    (-1, "is -1: input should be greater than or equal to 0"),
    (10**9, f"is {10**9}: input should be less than or equal to 99999"),
    (2.5, f"is 2.5: {INTEGER}"),
    ("499", f'is "499": {INTEGER}'),
    (True, f"is true: {INTEGER}"),
    (None, f"is null: {INTEGER}"),
]
NEEDS_NONE = "takes none; leave timesteps out or use lcm, euler, tcd, dpmpp_2m, dpmpp_2m_sde"
WITH_OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"timesteps": [999, 499], "num_inference_steps": 3},
     "timesteps is [999, 499] and num_inference_steps is 3; it must be 2, one step for each, or "
     "left out"),
    ({"timesteps": [800], "sampler": "ddim"},
     f"timesteps is [800] and the sampler ddim {NEEDS_NONE}"),
    ({"timesteps": [999, 499], "sampler": "euler_ancestral"},
     f"timesteps is [999, 499] and the sampler euler_ancestral {NEEDS_NONE}"),
]  # fmt: skip


def rows(table: dict[str, list[tuple[Any, str]]]) -> list[Any]:
    return [
        pytest.param(field, value, message, id=f"{field}-{index}")
        for field, wrong in table.items()
        for index, (value, message) in enumerate(wrong)
    ]


@pytest.mark.parametrize(("field", "value", "message"), rows(JSON_FIELDS))
def test_wrong_values_in_json(http: TestClient, field: str, value: Any, message: str) -> None:
    body = json.dumps({"prompt": "x"} | {field: value})
    assert_error(http.post(GENERATIONS, content=body), message, param=field)


@pytest.mark.parametrize(("field", "value", "message"), rows(LORA_FIELDS))
def test_wrong_values_in_loras(http: TestClient, field: str, value: Any, message: str) -> None:
    loras = [{"name": "ink"} | {field: value}]
    body = json.dumps({"prompt": "x", "loras": loras})
    assert_error(http.post(GENERATIONS, content=body), message, param=f"loras.0.{field}")
    form = {"prompt": "x", "loras": json.dumps(loras)}
    assert_error(post_form(http, form), message, param=f"loras.0.{field}")


@pytest.mark.parametrize(("value", "message"), TIMESTEPS)
def test_wrong_values_in_timesteps(http: TestClient, value: Any, message: str) -> None:
    body = {"prompt": "x", "timesteps": [999, value]}
    answer = http.post(GENERATIONS, json=body)
    assert_error(answer, f"timesteps.1 {message}", param="timesteps.1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "is -1: input should be greater than or equal to 0"),
        (10**9, f"is {10**9}: input should be less than or equal to 99999"),
        ("8", f'is "8": {INTEGER}'),
    ],
)
def test_wrong_values_in_a_crops_corner(http: TestClient, value: Any, message: str) -> None:
    body = {"prompt": "x", "crops_coords_top_left": [0, value]}
    answer = http.post(GENERATIONS, json=body)
    assert_error(answer, f"crops_coords_top_left.1 {message}", param="crops_coords_top_left.1")


@pytest.mark.parametrize(("fields", "message"), WITH_OTHERS)
def test_timesteps_that_do_not_go_with_other_fields(
    http: TestClient, fields: dict[str, Any], message: str
) -> None:
    body = {"prompt": "x"} | fields
    assert_error(http.post(GENERATIONS, json=body), message, "timesteps")
    assert_error(http.post(EDITS, json=body | {"image": PNG}), message, "timesteps")
    form = body | {"timesteps": json.dumps(fields["timesteps"])}
    assert_error(post_form(http, form), message, "timesteps")


AS_INTEGER = "input should be a valid integer, unable to parse string as an integer"
AS_NUMBER = "input should be a valid number, unable to parse string as a number"
AS_BOOLEAN = "input should be a valid boolean, unable to interpret input"

# Field → wrong values as form text, each with the whole message.
FORM_FIELDS: dict[str, list[tuple[str, str]]] = {
    "prompt": [
        ("", 'prompt is "": string should have at least 1 character'),
        ("  ", "prompt is blank; say what to draw"),
        ("x" * 501, "prompt is 501 characters; at most 500 characters are accepted"),
    ],
    "model": [("m" * 257, f'model is "{"m" * 76}...: string should have at most 256 characters')],
    "n": [
        ("two", f'n is "two": {AS_INTEGER}'),
        ("0", 'n is "0": input should be greater than or equal to 1'),
        ("5", "n is 5; at most 4 are accepted"),
        (
            "9" * 5000,
            f'n is "{"9" * 76}...: unable to parse input string as an integer, exceeded maximum '
            "size",
        ),
    ],
    "size": [("64", f'size is "64": {SIZE}'), ("64x24", f"size is 64x24; {SIDES}")],
    "response_format": [("png", f'response_format is "png": {one_of("b64_json", "url")}')],
    "output_format": [("gif", f'output_format is "gif": {FORMATS}')],
    "output_compression": [("high", f'output_compression is "high": {AS_INTEGER}')],
    "quality": [("best", f'quality is "best": {QUALITIES}')],
    "background": [("blue", f'background is "blue": {BACKGROUNDS}')],
    "stream": [("maybe", f'stream is "maybe": {AS_BOOLEAN}')],
    "partial_images": [("4", 'partial_images is "4": input should be less than or equal to 3')],
    "user": [("u" * 1025, f'user is "{"u" * 76}...: string should have at most 1024 characters')],
    "safety_identifier": [
        (
            "u" * 1025,
            f'safety_identifier is "{"u" * 76}...: string should have at most 1024 characters',
        )
    ],
    "moderation": [("high", f'moderation is "high": {one_of("auto", "low")}')],
    "style": [("bold", f'style is "bold": {one_of("vivid", "natural")}')],
    "num_inference_steps": [
        ("0", 'num_inference_steps is "0": input should be greater than or equal to 1'),
        ("21", "num_inference_steps is 21; at most 20 are accepted"),
    ],
    "timesteps": [
        (
            "999, 499",
            'timesteps is "999, 499": value error, write it as JSON, [999, 749, 499, 249]',
        ),
        ("800", "timesteps is 800: input should be a valid list"),
        ("[]", "timesteps is []: list should have at least 1 item after validation, not 0"),
        ("[499, 999]", "timesteps is [499, 999]; each must be below the one before it, the "
                       "noisiest is first"),
    ],
    "guidance_scale": [
        ("nan", f'guidance_scale is "nan": {FINITE}'),
        ("-inf", f'guidance_scale is "-inf": {FINITE}'),
        ("much", f'guidance_scale is "much": {AS_NUMBER}'),
        ("51", 'guidance_scale is "51": input should be less than or equal to 50'),
    ],
    "negative_prompt": [
        ("x" * 501, "negative_prompt is 501 characters; at most 500 characters are accepted")
    ],
    "original_size": [("1024x768", f"original_size is 1024x768; {NO_SIZES}")],
    "crops_coords_top_left": [
        ("0, 0", 'crops_coords_top_left is "0, 0": value error, write it as JSON, [0, 0]'),
        ("[8, 16]", f"crops_coords_top_left is [8, 16]; {NO_SIZES}"),
    ],
    "target_size": [("tall", f'target_size is "tall": {TOLD_SIZE}')],
    "seed": [("-1", 'seed is "-1": input should be greater than or equal to 0')],
    "sampler": [("heun", f'sampler is "heun": {SAMPLERS}')],
    "decoder": [
        ("taesd", f'decoder is "taesd": {DECODERS}'),
        ("tiny", f"decoder is 'tiny'; {NO_TINY_VAE}"),
    ],
    "priority": [("urgent", f'priority is "urgent": {PRIORITIES}')],
    "eta": [("2", 'eta is "2": input should be less than or equal to 1')],
    "loras": [
        (
            "ink",
            'loras is "ink": value error, write it as JSON, [{"name": "...", "weight": 1.0}]',
        ),
        ("{}", 'loras is {}: input should be a valid list'),
        ('[{"name": "ink"}]', "loras names 'ink'; served with this model: none"),
    ],
    "strength": [
        ("0", 'strength is "0": input should be greater than 0'),
        ("1.5", 'strength is "1.5": input should be less than or equal to 1'),
        ("nan", f'strength is "nan": {FINITE}'),
        ("far", f'strength is "far": {AS_NUMBER}'),
    ],
    "paste_back": [("perhaps", f'paste_back is "perhaps": {AS_BOOLEAN}')],
    "prompt_weighting": [("perhaps", f'prompt_weighting is "perhaps": {AS_BOOLEAN}')],
    "padding_mask_crop": [
        ("-1", 'padding_mask_crop is "-1": input should be greater than or equal to 0'),
    ],
    "mask_feather": [
        ("-1", 'mask_feather is "-1": input should be greater than or equal to 0'),
        ("257", 'mask_feather is "257": input should be less than or equal to 256'),
    ],
    "input_fidelity": [("most", f'input_fidelity is "most": {one_of("high", "low")}')],
}  # fmt: skip


def png(width: int = 64, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def post_form(
    http: TestClient, form: dict[str, Any], files: list[tuple[str, Any]] | None = None
) -> httpx.Response:
    return http.post(EDITS, data=form, files=files or [("image", ("x.png", png()))])


@pytest.mark.parametrize(("field", "value", "message"), rows(FORM_FIELDS))
def test_wrong_values_in_forms(http: TestClient, field: str, value: str, message: str) -> None:
    assert_error(post_form(http, {"prompt": "x"} | {field: value}), message, param=field)


PNG = base64.b64encode(png()).decode()
NO_FETCH = (
    "this service fetches no URL, send the image itself in base64 or as data:image/png;base64,..."
)
WIDE = base64.b64encode(png(65, 64)).decode()
NOTHING_TO_DRAW = "mask leaves nothing to draw: make transparent in it what is to change"
NOT_BASE64 = "which is not base64; send the whole file, encoded with padding"

# Fields that edits alone have, as JSON, each with the whole message.
EDIT_FIELDS: dict[str, list[tuple[Any, str]]] = {
    "strength": [
        ("0.5", f'strength is "0.5": {NUMBER}'),
        (0, "strength is 0: input should be greater than 0"),
    ],
    "input_fidelity": [("most", f'input_fidelity is "most": {one_of("high", "low")}')],
    "image": [
        (5, f"image is 5: {STRING}"),
        ([PNG], f'image is ["{PNG[:75]}...: {STRING}'),
        ("", "image is empty; send a PNG, JPEG or WebP file"),
        ("data:image/png;base64,", "image is empty; send a PNG, JPEG or WebP file"),
        ("https://example.org/x.png", f'image is "https://example.org/x.png"; {NO_FETCH}'),
        ("file:///etc/passwd", f'image is "file:///etc/passwd"; {NO_FETCH}'),
        ("data:image/svg+xml,<svg/>", f'image is "data:image/svg+xml,<svg/>"; {NO_FETCH}'),
        ("a picture?", f'image is "a picture?", {NOT_BASE64}'),
        ("abc=d", f'image is "abc=d", {NOT_BASE64}'),
        ("abcde", f'image is "abcde", {NOT_BASE64}'),
    ],
    "images": [
        (PNG, f'images is "{PNG[:76]}...: input should be a valid array'),
        ([], "image must be exactly one, got 0; send it in base64 as image, or as a data: URL in "
             "images[0].image_url"),
        ([{}] * 17, "images is [{}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}]"
                    ": list should have at most 16 items after validation, not 17"),
    ],
    "paste_back": [("yes", 'paste_back is "yes": ' + BOOLEAN)],
    "padding_mask_crop": [
        (4097, "padding_mask_crop is 4097: input should be less than or equal to 4096")
    ],
    "mask_feather": [(1.5, "mask_feather is 1.5: input should be a valid integer")],
    "mask": [
        (PNG, f'mask is "{PNG[:76]}...: input should be an object'),
        ({"image_url": WIDE}, "mask is 65x64 and image 64x64; send a mask of the image's own size"),
        ({"image_url": PNG}, NOTHING_TO_DRAW),
    ],
}  # fmt: skip
REFERENCE_FIELDS: dict[str, list[tuple[Any, str]]] = {
    "image_url": [
        (5, f"images.0.image_url is 5: {STRING}"),
        (
            "http://169.254.169.254/latest",
            f'images.0.image_url is "http://169.254.169.254/latest"; {NO_FETCH}',
        ),
    ],
    "file_id": [
        (
            "file-abc",
            "images.0.file_id is given; this service keeps no uploads, send the image in "
            "image_url as a data: URL",
        )
    ],
}


@pytest.mark.parametrize(("field", "value", "message"), rows(EDIT_FIELDS))
def test_wrong_values_in_json_edits(http: TestClient, field: str, value: Any, message: str) -> None:
    sent = {"prompt": "x"} | ({} if field == "images" else {"image": PNG}) | {field: value}
    param = "image" if "exactly one" in message else field
    assert_error(http.post(EDITS, json=sent), message, param)


@pytest.mark.parametrize(("field", "value", "message"), rows(REFERENCE_FIELDS))
def test_wrong_values_in_image_references(
    http: TestClient, field: str, value: Any, message: str
) -> None:
    answer = http.post(EDITS, json={"prompt": "x", "images": [{field: value}]})
    code = "unsupported_parameter" if field == "file_id" else "invalid_value"
    assert_error(answer, message, f"images.0.{field}", code)


JSON_EDITS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"image": PNG}, "prompt is required", "prompt", "missing_required_parameter"),
    ({"prompt": "x", "image": PNG, "images": [{"image_url": f"data:image/png;base64,{PNG}"}]},
     "image must be exactly one, got 2; send it in base64 as image, or as a data: URL in "
     "images[0].image_url", "image", ""),
    ({"prompt": "x", "image": PNG, "strenght": 1}, "unknown field 'strenght'; did you mean "
     "'strength'?", "strenght", "unknown_parameter"),
    ({"prompt": "x", "images": [{"image_url": PNG, "detail": "low"}]},
     "unknown field 'images.0.detail'", "images.0.detail", "unknown_parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message", "param", "code"), JSON_EDITS)
def test_wrong_json_edits(
    http: TestClient, body: dict[str, Any], message: str, param: str, code: str
) -> None:
    assert_error(http.post(EDITS, json=body), message, param, code or "invalid_value")


def test_a_json_edit_that_cannot_be_read_or_is_too_large(http: TestClient) -> None:
    answer = http.post(EDITS, content=b"{", headers={"content-type": "application/json"})
    assert_error(
        answer, f"{UNREADABLE}Invalid JSON: EOF while parsing an object at line 1 column 1"
    )
    wide = base64.b64encode(png(101, 100)).decode()
    answer = http.post(EDITS, json={"prompt": "x", "images": [{"image_url": wide}]})
    message = (
        "images.0.image_url is 101x100 = 10100 pixels; at most 10000 are accepted, scale it down "
        "first"
    )
    assert_error(answer, message, "images.0.image_url", "too_large", 413)
    numbers = {"prompt": "x", "image": list(range(10)) * 7000}  # as some write a file
    message = (
        "the JSON has about 70003 values; at most 65536 are accepted, send the image in "
        "base64, as one string"
    )
    body = json.dumps(numbers, separators=(",", ":"))
    answer = http.post(EDITS, content=body, headers={"content-type": "application/json"})
    assert_error(answer, message, code="too_large", status=413)
    answer = http.post(EDITS, json={"prompt": "x", "image": "A" * MAX_BODY_BYTES})
    assert answer.status_code == 413
    assert f"at most {MAX_BODY_BYTES} are accepted" in answer.json()["error"]["message"]


def test_every_field_has_a_row() -> None:
    assert set(JSON_FIELDS) == set(GenerationRequest.model_fields)
    assert set(FORM_FIELDS) == set(EditRequest.model_fields)
    assert set(EDIT_FIELDS) == set(EditBody.model_fields) - set(GenerationRequest.model_fields)
    assert set(REFERENCE_FIELDS) == set(ImageReference.model_fields)
    assert set(LORA_FIELDS) == set(LoraChoice.model_fields)
    assert all((*JSON_FIELDS.values(), *FORM_FIELDS.values(), *LORA_FIELDS.values()))
    assert all((*EDIT_FIELDS.values(), *REFERENCE_FIELDS.values()))


UNREADABLE = "the body is not a JSON object of parameters: "
BODIES: list[tuple[bytes, str, str | None, str]] = [
    (b"", f"{UNREADABLE}Invalid JSON: EOF while parsing a value at line 1 column 0", None, ""),
    (b"{", f"{UNREADABLE}Invalid JSON: EOF while parsing an object at line 1 column 1", None, ""),
    (b"null", f"{UNREADABLE}Input should be an object", None, ""),
    (b"[]", f"{UNREADABLE}Input should be an object", None, ""),
    (b'{"prompt":"\xff"}',
     f"{UNREADABLE}Invalid JSON: invalid unicode code point at line 1 column 12", None, ""),
    (b'{"prompt":"\\ud800"}',
     f"{UNREADABLE}Invalid JSON: unexpected end of hex escape at line 1 column 18", None, ""),
    (b"[" * 50_000,
     f"{UNREADABLE}Invalid JSON: recursion limit exceeded at line 1 column 202", None, ""),
    (b'{"prompt":"x","seed":' + b"9" * 5000 + b"}",
     f"{UNREADABLE}Invalid JSON: number out of range at line 1 column 4323", None, ""),
    (b"{}", "prompt is required", "prompt", "missing_required_parameter"),
    (b'{"prompt":"x","strength":null}', "unknown field 'strength'", "strength",
     "unknown_parameter"),
    (b'{"prompt":"x","loras":[{"name":null}]}', f"loras.0.name is null: {STRING}", "loras.0.name",
     ""),
    (b'{"prompt":"x","n":3,"seed":9223372036854775806}',
     "seed is 9223372036854775806 and n is 3; image k uses seed + k, which may be "
     "9223372036854775807 at most, send a smaller seed", "seed", ""),
    *(
        (codecs.BOM_UTF16_LE * has_mark + '{"prompt":"x"}'.encode(encoding),
         f"the JSON body is {name} text; JSON is read as UTF-8, send it as that", None, "")
        for encoding, name, has_mark in (
            ("utf-16-le", "UTF-16", True), ("utf-16-le", "UTF-16", False),
            ("utf-16-be", "UTF-16", False), ("utf-32", "UTF-32", False),
            ("utf-32-be", "UTF-32", False),
        )
    ),
    (b'{"prompt":"a","prompt":"b"}', "prompt is given twice; send it once", "prompt", ""),
    (b'{"prompt":"x","loras":[{"name":"a","name":"b"}]}',
     "name is given twice; send it once", "name", ""),
    (b'{"prompt":"x","guidence_scale":3}',
     "unknown field 'guidence_scale'; did you mean 'guidance_scale'?", "guidence_scale",
     "unknown_parameter"),
    (b'{"prompt":"x","loras":[{"name":"a","scale":1}]}',
     "unknown field 'loras.0.scale'", "loras.0.scale", "unknown_parameter"),
    (b'{"prompt":"x","":1}', "unknown field ''", "", "unknown_parameter"),
    (b'{"prompt":"x","' + b"y" * 900 + b'":1}',
     f"unknown field '{'y' * 61}...'", f"{'y' * 61}...", "unknown_parameter"),
    (b'{"prompt":"x","loras":[' + b",".join([b"{}"] * 9) + b"]}",
     "loras is [{}, {}, {}, {}, {}, {}, {}, {}, {}]: list should have at most 8 items after "
     "validation, not 9", "loras", ""),
    (b"{" + b",".join(b'"f%d":1' % i for i in range(200)) + b"}",
     "the body has 201 wrong or unknown fields; GET /docs lists the known", None, ""),
    (b'{"prompt":"x","model":"other"}',
     "model 'other' is not served here; this service has 'tiny-lcm' (GET /v1/models)", "model",
     "model_not_found"),
    (b'{"prompt":"' + b"x" * 40 + b'"}',
     "prompt is 26 tokens longer than the text encoder's window of 16; shorten it", "prompt",
     "prompt_too_long"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message", "param", "code"), BODIES)
def test_wrong_bodies(
    http: TestClient, body: bytes, message: str, param: str | None, code: str
) -> None:
    answer = http.post(GENERATIONS, content=body)
    status = 404 if code == "model_not_found" else 400
    assert_error(answer, message, param, code or "invalid_value", status)


TWO = "it must be seconds from 0.001, which no image takes less than, to 60"
HEADERS: list[tuple[dict[str, str], str, str | None]] = [
    ({"x-request-timeout": "soon"}, f"X-Request-Timeout is 'soon'; {TWO}", "X-Request-Timeout"),
    ({"x-request-timeout": ""}, f"X-Request-Timeout is ''; {TWO}", "X-Request-Timeout"),
    ({"x-request-timeout": "0"}, f"X-Request-Timeout is '0'; {TWO}", "X-Request-Timeout"),
    ({"x-request-timeout": "5e-324"}, f"X-Request-Timeout is '5e-324'; {TWO}", "X-Request-Timeout"),
    ({"x-request-timeout": "-1"}, f"X-Request-Timeout is '-1'; {TWO}", "X-Request-Timeout"),
    ({"x-request-timeout": "61"}, f"X-Request-Timeout is '61'; {TWO}", "X-Request-Timeout"),
    ({"x-request-timeout": "nan"}, f"X-Request-Timeout is 'nan'; {TWO}", "X-Request-Timeout"),
    ({"x-request-timeout": "inf"}, f"X-Request-Timeout is 'inf'; {TWO}", "X-Request-Timeout"),
    ({"content-type": "text/plain"},
     'the Content-Type is "text/plain"; it must be application/json', None),
    ({"content-type": "multipart/form-data; boundary=b"},
     'the Content-Type is "multipart/form-data"; it must be application/json', None),
    ({"content-type": "application/json; charset=UTF-16"},
     'the Content-Type says that the body is "UTF-16"; JSON is read as UTF-8, send it as that',
     None),
    *(
        ({"content-encoding": coding},
         f'the Content-Encoding is "{coding}"; compressed bodies are not read, send it '
         "uncompressed and without that header", None)
        for coding in ("gzip", "deflate", "br", "identity, zstd")
    ),
    ({"accept": "image/webp"},
     "output_format is 'png' but the Accept header asks for 'webp'; send one of them",
     "output_format"),
    ({"accept": "image/png"},
     "n is 2, but a raw image body (image/png) carries one image; ask for application/json", "n"),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "message", "param"), HEADERS)
def test_wrong_headers(
    http: TestClient, headers: dict[str, str], message: str, param: str | None
) -> None:
    body = json.dumps({"prompt": "x", "n": 2, "output_format": "png"})
    assert_error(http.post(GENERATIONS, content=body, headers=headers), message, param)


def test_a_compressed_form_is_refused(http: TestClient) -> None:
    answer = http.post(EDITS, content=b"", headers={"content-encoding": "gzip"})
    message = (
        'the Content-Encoding is "gzip"; compressed bodies are not read, send it uncompressed and '
        "without that header"
    )
    assert_error(answer, message)


def test_a_raw_image_cannot_be_streamed(http: TestClient) -> None:
    body = json.dumps({"prompt": "x", "stream": True})
    answer = http.post(GENERATIONS, content=body, headers={"accept": "text/html, image/webp;q=0.5"})
    message = (
        "stream is true, but a raw image body (text/html, image/webp;q=0.5) carries one image; "
        "ask for application/json"
    )
    assert_error(answer, message, "stream")


@pytest.mark.parametrize("given", ["", "a b", "é", "x" * 129])
def test_a_request_id_that_logs_cannot_carry_is_replaced(http: TestClient, given: str) -> None:
    answer = http.get("/v1/models", headers={"x-request-id": given.encode("latin-1")})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("path", "headers", "size", "message"),
    [
        (GENERATIONS, {}, max_json_bytes(500) + 1,
         f"the JSON body has more than {max_json_bytes(500)} bytes, which is room for the two "
         "longest prompts; shorten them"),
        (GENERATIONS, {"content-length": "999999"}, 10,
         "the body has 999999 bytes or more; at most 200000 are accepted, send smaller images"),
        (EDITS, {"content-length": "5", "content-type": "multipart/form-data; boundary=b"}, 300_000,
         "the body has 300000 bytes or more; at most 200000 are accepted, send smaller images"),
    ],
)  # fmt: skip
def test_bodies_that_are_too_large_or_lie(
    http: TestClient, path: str, headers: dict[str, str], size: int, message: str
) -> None:
    answer = http.post(path, content=b" " * size, headers=headers)
    assert_error(answer, message, code="too_large", status=413)


FILE = ("x.png", png())
UPLOADS: list[tuple[dict[str, Any], list[tuple[str, Any]], str, str | None, str]] = [
    ({}, [("image", FILE)], "prompt is required", "prompt", "missing_required_parameter"),
    ({"prompt": "x"}, [("prompt", FILE)],
     "prompt is a file; only image and mask are", "prompt", ""),
    ({"prompt": "x", "image": "y"}, [("image", FILE)],
     "image is text; send it as a file", "image", ""),
    ({"prompt": "x"}, [("image", FILE), ("image[]", FILE)],
     "image must be exactly one file, got 2", "image", ""),
    ({"prompt": "x"}, [("image", FILE), ("mask", FILE)], NOTHING_TO_DRAW, "mask", ""),
    ({"prompt": "x"}, [("image", FILE), ("mask", ("m.png", b"GIF89a"))],
     "mask is a file of the format GIF; save it as JPEG, PNG or WebP", "mask", ""),
    ({"prompt": "x"}, [("image", FILE), ("mask", FILE), ("mask", FILE)],
     "mask must be at most one file, got 2", "mask", ""),
    ({"prompt": ["x", "y"]}, [("image", FILE)], "prompt is given twice; send it once", "prompt",
     ""),
    ({"prompt": "x", "strenght": "1"}, [("image", FILE)],
     "unknown field 'strenght'; did you mean 'strength'?", "strenght", "unknown_parameter"),
    ({"prompt": "x"}, [("image", ("x.png", b""))],
     "image is empty; send a PNG, JPEG or WebP file", "image", ""),
    ({"prompt": "x"}, [("image", FILE), ("prompt", ("", b""))],
     "prompt is given twice; send it once", "prompt", ""),
    ({"prompt": "x"}, [("image", FILE), ("other", ("y.png", b""))],
     "unknown field 'other'", "other", "unknown_parameter"),
    ({"prompt": "x", "other": ""}, [("image", FILE)],
     "unknown field 'other'", "other", "unknown_parameter"),
    ({"prompt": "x", "mask": "data:image/png;base64,"}, [("image", FILE)],
     "mask is text; send it as a file", "mask", ""),
    ({"prompt": "x"}, [("image", FILE)] * 9,
     "the multipart body cannot be read: Too many files. Maximum number of files is 8.", None, ""),
    ({f"f{i}": "x" for i in range(65)}, [("image", FILE)],
     "the multipart body cannot be read: Too many fields. Maximum number of fields is 64.", None,
     ""),
    ({"prompt": "x", "strength": "0.1", "num_inference_steps": "8"}, [("image", FILE)],
     "num_inference_steps is 8; the lcm sampler takes 1 to 5 at strength 0.1",
     "num_inference_steps", ""),
]  # fmt: skip


@pytest.mark.parametrize(("form", "files", "message", "param", "code"), UPLOADS)
def test_wrong_forms(
    http: TestClient,
    form: dict[str, Any],
    files: list[tuple[str, Any]],
    message: str,
    param: str | None,
    code: str,
) -> None:
    assert_error(post_form(http, form, files), message, param, code or "invalid_value")


def test_an_image_of_too_many_pixels(http: TestClient) -> None:
    answer = post_form(http, {"prompt": "x"}, [("image", ("x.png", png(101, 100)))])
    message = "image is 101x100 = 10100 pixels; at most 10000 are accepted, scale it down first"
    assert_error(answer, message, "image", "too_large", 413)


UNREADABLE_FORM = "the multipart body cannot be read: "
NO_BOUNDARY = (
    f"{UNREADABLE_FORM}the Content-Type has no boundary of 1 to 70 letters, digits and '()+_,-./:=?"
)
FORM_BODIES: list[tuple[str, bytes, str, str | None]] = [
    ("text/plain", b"{}",
     'the Content-Type is "text/plain"; it must be multipart/form-data, with one file field '
     "`image`, or application/json", None),
    ("", b"",
     'the Content-Type is ""; it must be multipart/form-data, with one file field `image`, or '
     "application/json", None),
    ("multipart/form-data", b"", NO_BOUNDARY, None),
    ("multipart/form-data; boundary=" + "b" * 71, b"", NO_BOUNDARY, None),
    ('multipart/form-data; boundary="b\\";charset=utf-7"', b"", NO_BOUNDARY, None),
    ("multipart/form-data; boundary=b", b"", "image must be exactly one file, got 0", "image"),
    ("multipart/form-data; boundary=b", b"nonsense", f"{UNREADABLE_FORM}Invalid multipart data.",
     None),
    ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--",
     f'{UNREADABLE_FORM}The Content-Disposition header field "name" must be provided.', None),
    ("multipart/form-data; boundary=b",
     b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--b--',
     "prompt is not UTF-8 text: invalid start byte", None),
    # Python knows charsets that decode to what no JSON can carry.
    ("multipart/form-data; boundary=b; charset=utf-7",
     b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n+2AA-\r\n--b--',
     "image must be exactly one file, got 0", "image"),
]  # fmt: skip


@pytest.mark.parametrize(("media_type", "body", "message", "param"), FORM_BODIES)
def test_wrong_multipart(
    http: TestClient, media_type: str, body: bytes, message: str, param: str | None
) -> None:
    answer = http.post(EDITS, content=body, headers={"content-type": media_type})
    assert_error(answer, message, param)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", GENERATIONS, "POST"), ("PUT", GENERATIONS, "POST"), ("OPTIONS", EDITS, "POST"),
        ("DELETE", EDITS, "POST"), ("POST", "/v1/models", "GET"),
        ("PATCH", "/v1/models/tiny-lcm", "GET"), ("POST", "/healthz", "GET"),
        ("POST", "/readyz", "GET"), ("POST", "/metrics", "GET"), ("POST", "/", "GET"),
        ("POST", "/docs", "GET"), ("TRACE", GENERATIONS, "POST"),
    ],
)  # fmt: skip
def test_wrong_methods(http: TestClient, method: str, path: str, allowed: str) -> None:
    answer = http.request(method, path)
    message = f"{method} {path} is not allowed; use {allowed}"
    assert_error(answer, message, code="method_not_allowed", status=405)
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/images", "/v2/models", "/.env", "/v1/images/variations"]
)
def test_wrong_paths(http: TestClient, path: str) -> None:
    message = f"no such path: POST {path} (GET /docs lists them)"
    assert_error(http.post(path), message, code="not_found", status=404)


@pytest.mark.parametrize("name", ["gpt-image-1", "a/b", "%00", "%ff", "..%2f..%2fetc"])
def test_wrong_models(http: TestClient, name: str) -> None:
    answer = http.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "is not served here; this service has 'tiny-lcm'" in error["message"]
