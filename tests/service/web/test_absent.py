"""What clients send for "nothing": null, an empty form field, an empty file. And a ladder of steps.

Each is compared with the same request without the field.
"""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.web.admission import steps_of_quality
from service.web.schema import EditBody, EditRequest, GenerationRequest

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
BODY = {"prompt": "a red star", "seed": 7, "num_inference_steps": 2}
OPTIONAL = set(GenerationRequest.model_fields) - set(BODY)
OPTIONAL_IN_FORMS = set(EditRequest.model_fields) - set(BODY)
OPTIONAL_IN_EDITS = set(EditBody.model_fields) - set(BODY) - {"image"}


def upload() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def said(answer: httpx.Response) -> dict[str, Any]:
    """All of an answer that does not depend on the clock."""
    assert answer.status_code == 200, answer.text
    return {key: value for key, value in answer.json().items() if key not in ("created", "timings")}


def edit(http: TestClient, form: dict[str, str], *empty_files: tuple[str, str]) -> httpx.Response:
    """As browsers write it: ``empty_files`` are a field and a file's name, which may be empty."""
    parts = [(f'name="{name}"', str(value).encode()) for name, value in (BODY | form).items()]
    parts += [(f'name="{field}"; filename="{name}"', b"") for field, name in empty_files]
    parts += [('name="image"; filename="x.png"', upload())]
    body = b"".join(
        f"--b\r\nContent-Disposition: form-data; {about}\r\n\r\n".encode() + data + b"\r\n"
        for about, data in parts
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    return http.post(EDITS, content=body + b"--b--\r\n", headers=headers)


@pytest.fixture(scope="module")
def plain(http: TestClient) -> dict[str, Any]:
    return said(http.post(GENERATIONS, json=BODY))


@pytest.fixture(scope="module")
def plain_edit(http: TestClient) -> dict[str, Any]:
    return said(edit(http, {}))


@pytest.mark.parametrize("field", sorted(OPTIONAL))
def test_null_is_the_default(http: TestClient, plain: dict[str, Any], field: str) -> None:
    assert said(http.post(GENERATIONS, json=BODY | {field: None})) == plain


def test_null_is_the_default_of_seed_steps_and_a_loras_weight(http: TestClient) -> None:
    body = BODY | {"seed": None, "num_inference_steps": None}
    drawn = said(http.post(GENERATIONS, json=body))
    assert drawn["num_inference_steps"] == 4  # the model's default
    other = said(http.post(GENERATIONS, json=body))
    assert drawn["data"][0]["seed"] != other["data"][0]["seed"]  # of 2^32
    loras = json.dumps([{"name": "ink", "weight": None}])
    params = GenerationRequest.model_validate_json(f'{{"prompt": "x", "loras": {loras}}}')
    assert params.loras is not None
    assert params.loras[0].weight == 1


def test_a_null_format_leaves_the_choice_to_accept(http: TestClient) -> None:
    body = BODY | {"output_format": None}
    answer = http.post(GENERATIONS, json=body, headers={"accept": "image/webp"})
    assert answer.headers["content-type"] == "image/webp", answer.text


@pytest.mark.parametrize("field", sorted(OPTIONAL_IN_EDITS))
def test_null_is_the_default_of_an_edit_as_json(
    http: TestClient, plain_edit: dict[str, Any], field: str
) -> None:
    body = BODY | {"image": base64.b64encode(upload()).decode(), field: None}
    assert said(http.post(EDITS, json=body)) == plain_edit


def test_null_is_no_image(http: TestClient, plain_edit: dict[str, Any]) -> None:
    url = "data:image/png;base64," + base64.b64encode(upload()).decode()
    references = [{"image_url": None}, {"image_url": url, "file_id": None}]
    assert said(http.post(EDITS, json=BODY | {"image": None, "images": references})) == plain_edit


@pytest.mark.parametrize("field", sorted(OPTIONAL_IN_FORMS))
def test_an_empty_form_field_is_the_default(
    http: TestClient, plain_edit: dict[str, Any], field: str
) -> None:
    assert said(edit(http, {field: ""})) == plain_edit
    assert said(edit(http, {}, (field, ""))) == plain_edit  # an unselected file


def test_an_unselected_file_is_none(http: TestClient, plain_edit: dict[str, Any]) -> None:
    for name in ("mask", "image", "image[]"):
        assert said(edit(http, {}, (name, ""))) == plain_edit
        assert said(edit(http, {name: ""})) == plain_edit
    assert said(edit(http, {}, ("mask", "mask.png"))) == plain_edit
    assert "image must be exactly one file, got 2" in edit(http, {}, ("image", "y.png")).text


def test_a_whole_number_is_an_integer_however_json_writes_it(
    http: TestClient, plain: dict[str, Any]
) -> None:
    body = '{"prompt": "a red star", "seed": 7.0, "num_inference_steps": 2e0, "n": 1.0}'
    assert said(http.post(GENERATIONS, content=body)) == plain


def test_a_byte_order_mark_before_utf_8_is_no_part_of_it(
    http: TestClient, plain: dict[str, Any]
) -> None:
    body = json.dumps(BODY).encode("utf-8-sig")
    for media_type in ("application/json", 'Application/JSON; charset="UTF-8"'):
        answer = http.post(GENERATIONS, content=body, headers={"content-type": media_type})
        assert said(answer) == plain


def test_the_document_says_what_may_be_null_or_empty(http: TestClient) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    null, empty = {"type": "null"}, {"type": "string", "maxLength": 0}
    properties = schemas["GenerationRequest"]["properties"]
    assert {name for name, each in properties.items() if null in each.get("anyOf", ())} == (
        set(GenerationRequest.model_fields) - {"prompt"}
    )
    properties = schemas["EditForm"]["properties"]
    left_blank = {
        name
        for name, each in properties.items()
        if empty in each.get("anyOf", ()) or "" in each.get("enum", ())
    }
    assert left_blank == set(EditRequest.model_fields) - {"prompt"}


@pytest.mark.parametrize(
    ("default", "max_steps", "low", "high"),
    [(4, 50, 2, 8), (25, 50, 13, 50), (1, 50, 1, 2), (30, 50, 15, 50), (50, 50, 25, 50)],
)
def test_quality_is_a_ladder_around_the_default(
    default: int, max_steps: int, low: int, high: int
) -> None:
    steps = {
        quality: steps_of_quality(quality, default, max_steps)
        for quality in ("auto", "low", "medium", "standard", "high", "hd")
    }
    assert steps == {
        "low": low, "auto": default, "medium": default, "standard": default, "high": high,
        "hd": high,
    }  # fmt: skip


def test_quality_counts_where_no_steps_are_given(http: TestClient) -> None:
    for quality, num_steps in (("low", 2), ("standard", 4), ("hd", 8)):
        body = {"prompt": "x", "quality": quality}
        assert said(http.post(GENERATIONS, json=body))["num_inference_steps"] == num_steps
        body |= {"num_inference_steps": 3}
        assert said(http.post(GENERATIONS, json=body))["num_inference_steps"] == 3


def test_the_largest_seeds_come_back_and_can_be_sent_again(http: TestClient) -> None:
    largest = 2**63 - 1
    body = BODY | {"seed": largest - 2, "n": 3}
    three = said(http.post(GENERATIONS, json=body))["data"]
    assert [image["seed"] for image in three] == [largest - 2, largest - 1, largest]
    (again,) = said(http.post(GENERATIONS, json=BODY | {"seed": three[2]["seed"]}))["data"]
    assert again == three[2]
