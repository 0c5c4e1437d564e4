"""The HTTP surface over the real engine on a tiny model: the `openai` client and raw HTTP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.types import Message

from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app


@pytest.fixture(scope="module")
def replica(lcm_checkpoint: Path, cache_dir: Path) -> Replica:
    settings = load_settings(
        {
            "model": str(lcm_checkpoint),
            "engine": "onnxruntime",
            "cache_dir": cache_dir,
            "aliases": ("lcm",),
            "max_body_bytes": 200_000,
            "max_input_px": 300 * 300,
        }
    )
    return Replica(settings)


@pytest.fixture(scope="module")
def http(replica: Replica) -> Iterator[TestClient]:
    with TestClient(build_app(replica)) as client:
        yield client


@pytest.fixture(scope="module")
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(
        api_key="none", base_url=f"{http.base_url}/v1", http_client=http, max_retries=0
    )


def picture(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def picture_at(http: TestClient, url: str) -> Image.Image:
    return Image.open(io.BytesIO(http.get(url).content))


def png(width: int = 64, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_openai_client_generates(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a red star", model="lcm", n=2, size="64x96", output_format="webp",
        extra_body={"seed": 7, "num_inference_steps": 2},
    )  # fmt: skip
    assert answer.data is not None
    assert [item.model_extra["seed"] for item in answer.data] == [7, 8]  # type: ignore[index]
    for item in answer.data:
        image = picture(item.b64_json)
        assert image.size == (64, 96)
        assert image.format == "WEBP"
    again = client.images.generate(prompt="a red star", size="64x96", output_format="webp",
                                   extra_body={"seed": 8, "num_inference_steps": 2})  # fmt: skip
    assert again.data is not None
    assert again.data[0].b64_json == answer.data[1].b64_json  # row results ignore neighbours


def test_the_openai_client_streams(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(
            prompt="a red star", stream=True, partial_images=2, extra_body={"seed": 1}
        )
    )
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    shades = [np.asarray(picture(event.b64_json)).std() for event in events]  # type: ignore[union-attr]
    assert min(shades) > 1, "a preview is blank"
    whole = client.images.generate(prompt="a red star", extra_body={"seed": 1})
    assert whole.data is not None
    assert whole.data[0].b64_json == events[-1].b64_json  # type: ignore[union-attr]


def test_each_image_has_a_seed_of_its_own_in_every_shape(http: TestClient) -> None:
    """What a seed draws alone, it draws as one of several, in JSON and in a stream."""
    body = {"prompt": "a red star", "num_inference_steps": 2}

    def alone(seed: int) -> bytes:
        headers = {"accept": "image/png"}
        answer = http.post("/v1/images/generations", json=body | {"seed": seed}, headers=headers)
        assert answer.headers["x-fourstep-seed"] == str(seed)
        return answer.content

    def events(path: str, **options: Any) -> list[dict[str, Any]]:
        lines = http.post(path, **options).text.splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    wanted = {seed: alone(seed) for seed in (5, 6, 7)}
    assert len(set(wanted.values())) == 3
    three = body | {"seed": 5, "n": 3}
    data = http.post("/v1/images/generations", json=three).json()["data"]
    assert [item["seed"] for item in data] == [5, 6, 7]
    found = events("/v1/images/generations", json=three | {"stream": True, "partial_images": 1})
    completed = [event for event in found if event["type"] == "image_generation.completed"]
    assert sorted((event["image_index"], event["seed"]) for event in completed) == [
        (0, 5), (1, 6), (2, 7),
    ]  # fmt: skip
    for item in (*data, *completed):
        assert base64.b64decode(item["b64_json"]) == wanted[item["seed"]]
    previews = [event for event in found if event["type"] == "image_generation.partial_image"]
    assert sorted((event["image_index"], event["seed"]) for event in previews) == [
        (0, 5), (1, 6), (2, 7),
    ]  # fmt: skip
    form = {name: str(value).lower() for name, value in (three | {"stream": True}).items()}
    edited = events("/v1/images/edits", data=form, files={"image": ("x.png", png())})
    assert sorted(event["seed"] for event in edited) == [5, 6, 7]
    assert len({event["b64_json"] for event in edited}) == 3


def test_a_random_first_seed_is_told_and_draws_the_same_again(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red star", n=2).data or []
    seeds = [item.model_dump()["seed"] for item in answer]
    assert seeds == [seeds[0], seeds[0] + 1]
    again = client.images.generate(prompt="a red star", extra_body={"seed": seeds[1]}).data or []
    assert again[0].b64_json == answer[1].b64_json


def test_the_openai_client_edits_and_lists(client: openai.OpenAI) -> None:
    answer = client.images.edit(
        image=("in.png", png(100, 70)), prompt="redraw", extra_body={"strength": 0.5, "seed": 3}
    )
    assert answer.data is not None
    assert picture(answer.data[0].b64_json).size == (96, 72)  # nearest size the model draws
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "tiny-lcm"
    with pytest.raises(openai.NotFoundError, match="model 'gpt-image-9' is not served"):
        client.images.generate(prompt="x", model="gpt-image-9")
    with pytest.raises(openai.BadRequestError, match="size is 60x64"):
        client.images.generate(prompt="x", size="60x64")  # type: ignore[arg-type]


def test_raw_image_with_seed_timings_and_parameters(http: TestClient) -> None:
    body = {"prompt": "星 ünïcode 🎨", "seed": 11, "num_inference_steps": 3}
    headers = {"accept": "image/png", "x-request-id": "mine-1"}
    answer = http.post("/v1/images/generations", json=body, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-fourstep-seed"] == "11"
    assert answer.headers["x-request-id"] == "mine-1"
    assert "denoise;dur=" in answer.headers["server-timing"]
    text = Image.open(io.BytesIO(answer.content)).text  # type: ignore[attr-defined]
    assert "星 ünïcode 🎨" in text["parameters"]
    assert "Steps: 3, Sampler: lcm, CFG scale: 8.5, Seed: 11, Size: 64x64" in text["parameters"]


def test_a_raw_image_has_the_compression_that_its_format_takes(http: TestClient) -> None:
    body = {"prompt": "x", "seed": 12, "num_inference_steps": 1, "output_compression": 20}
    raw = http.post("/v1/images/generations", json=body, headers={"accept": "image/jpeg"}).content
    told = http.post("/v1/images/generations", json=body | {"output_format": "jpeg"}).json()
    assert raw == base64.b64decode(told["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(raw)).format == "JPEG"


def test_answers_say_what_was_done(http: TestClient) -> None:
    body = {"prompt": "x" * 40, "negative_prompt": "blurry", "response_format": "url"}
    answer = http.post("/v1/images/generations", json=body).json()
    assert picture_at(http, answer["data"][0]["url"]).size == (64, 64)
    assert set(answer["timings"]) >= {"queue_ms", "denoise_ms", "decode_ms", "total_ms"}
    assert answer["timings"]["total_ms"] >= answer["timings"]["denoise_ms"] > 0
    assert any("26 tokens longer" in warning for warning in answer["warnings"])
    assert any("negative_prompt has no effect" in warning for warning in answer["warnings"])


GENERATIONS = [
    ({}, "prompt", "prompt is required"),
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": "  "}, "prompt", "blank"),
    ({"prompt": 5}, "prompt", "prompt is 5: input should be a valid string"),
    ({"prompt": "x" * 4001}, "prompt", "at most 4000 characters"),
    ({"prompt": "x", "n": 0}, "n", "n is 0: input should be greater than or equal to 1"),
    ({"prompt": "x", "n": 11}, "n", "less than or equal to 10"),
    ({"prompt": "x", "n": "2"}, "n", 'n is "2": input should be a valid integer'),
    ({"prompt": "x", "n": 1.5}, "n", "integer"),
    ({"prompt": "x", "size": "64"}, "size", "match"),
    ({"prompt": "x", "size": "0x64"}, "size", "match"),
    ({"prompt": "x", "size": "64x4096"}, "size", "multiples of 8 from 32 to 128"),
    ({"prompt": "x", "seed": -1}, "seed", "greater than or equal to 0"),
    ({"prompt": "x", "num_inference_steps": 51}, "num_inference_steps", "at most 50"),
    ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps", "greater than or equal"),
    ({"prompt": "x", "sampler": "heun"}, "sampler", "'lcm'"),
    ({"prompt": "x", "guidance_scale": 51}, "guidance_scale", "less than or equal to 50"),
    ({"prompt": "x", "output_format": "gif"}, "output_format", "'png'"),
    ({"prompt": "x", "output_compression": 50}, "output_compression", "lossless"),
    ({"prompt": "x", "partial_images": 2}, "partial_images", "set stream to true"),
    ({"prompt": "x", "background": "transparent"}, "background", "opaque"),
    ({"prompt": "x", "guidence_scale": 3}, "guidence_scale", "did you mean 'guidance_scale'"),
]


@pytest.mark.parametrize(("body", "param", "message"), GENERATIONS)
def test_wrong_values_are_named(
    http: TestClient, body: dict[str, Any], param: str, message: str
) -> None:
    answer = http.post("/v1/images/generations", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("headers", "body", "status", "message"),
    [
        ({}, b"{", 400, "not a JSON object"),
        ({}, b"[]", 400, "not a JSON object"),
        ({}, b'{"prompt": "' + b"x" * 300_000 + b'"}', 413, "at most 200000"),
        ({"accept": "image/png"}, b'{"prompt": "x", "n": 2}', 400, "n is 2"),
        ({"accept": "image/png"}, b'{"prompt": "x", "output_format": "webp"}', 400, "Accept"),
        ({"accept": "image/png"}, b'{"prompt": "x", "response_format": "url"}', 400, "is 'url'"),
        ({"accept": "image/png"}, b'{"prompt": "x", "output_compression": 9}', 400, "lossless"),
        ({"x-request-timeout": "soon"}, b'{"prompt": "x"}', 400, "X-Request-Timeout"),
        ({"x-request-timeout": "0.001"}, b'{"prompt": "x"}', 504, "not finished by its deadline"),
    ],
)
def test_wrong_requests(
    http: TestClient, headers: dict[str, str], body: bytes, status: int, message: str
) -> None:
    answer = http.post("/v1/images/generations", content=body, headers=headers)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_wrong_paths_and_methods(http: TestClient) -> None:
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    answer = http.get("/v1/images/generations")
    assert answer.status_code == 405
    assert "POST" in answer.json()["error"]["message"]


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("upload", "status"),
    [(b"", 400), (b"GIF89a....", 400), (png()[:200], 400), (png(400, 300)[:], 413), (bomb(), 413)],
    ids=["empty", "other format", "cut off", "too many pixels", "bomb"],
)
def test_hostile_uploads(http: TestClient, upload: bytes, status: int) -> None:
    if len(upload) > 200_000:
        upload = upload[:1000]  # still within the body limit: the header alone must be enough
    files = {"image": ("x.png", upload)}
    answer = http.post("/v1/images/edits", data={"prompt": "x"}, files=files)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == "image"


def test_edit_forms(http: TestClient) -> None:
    def post(data: dict[str, str], *names: str) -> httpx.Response:
        return http.post(
            "/v1/images/edits", data=data, files=[(n, ("x.png", png())) for n in names]
        )

    assert "other is a file; only image and mask are" in post({"prompt": "x"}, "other").text
    assert "got 2" in post({"prompt": "x"}, "image[]", "image[]").text
    assert "got 2" in post({"prompt": "x"}, "image", "mask", "mask").text
    assert "strength is" in post({"prompt": "x", "strength": "2"}, "image").text
    assert "leaves no step" not in post({"prompt": "x", "strength": "0.5"}, "image[]").text
    assert post({"prompt": "x", "stream": "true"}, "image").text.rstrip().endswith("data: [DONE]")


def test_probes_metrics_docs_and_page(http: TestClient) -> None:
    assert http.get("/healthz").text == "ok\n"
    assert http.get("/readyz").text == "ready\n"
    http.post("/v1/images/generations", json={"prompt": "x"})
    metrics = http.get("/metrics").text
    for line in (
        'fourstep_requests_total{endpoint="generations",model="tiny-lcm",status="200"}',
        'fourstep_requests_total{endpoint="generations",model="tiny-lcm",status="400"}',
        "fourstep_denoise_step_seconds_bucket",
        "fourstep_text_encode_seconds_count",
        'fourstep_decode_seconds_count{decoder="full",model="tiny-lcm"}',
        "fourstep_image_encode_seconds_count",
        "fourstep_queue_seconds_count",
        'fourstep_batch_rows_count{model="tiny-lcm",stage="denoise"}',
        "fourstep_waiting_rows",
        "fourstep_running_rows",
    ):
        assert line in metrics, line
    page = http.get("/").text
    assert "Fourstep" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    docs = http.get("/docs").text
    assert "cdn" not in docs
    schema = http.get("/openapi.json").json()
    assert (
        "num_inference_steps" in schema["components"]["schemas"]["GenerationRequest"]["properties"]
    )


def test_a_stream_whose_client_goes_before_its_first_event_holds_nothing(
    http: TestClient, replica: Replica
) -> None:
    """By the ASGI messages themselves: the head cannot be sent, so no event is ever asked for."""
    images = f'fourstep_images_total{{model="{replica.runner.info.model_id}"}}'
    before = http.get("/metrics").text
    body = {"prompt": "x", "stream": True, "num_inference_steps": 50}

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Message) -> None:
        raise OSError("the connection is closed")

    scope = {
        "type": "http", "method": "POST", "path": "/v1/images/generations",
        "headers": [], "query_string": b"",
        "asgi": {"version": "3.0", "spec_version": "2.4"}, "root_path": "",
    }  # fmt: skip
    with contextlib.suppress(OSError):
        asyncio.run(http.app(scope, receive, send))
    deadline = time.monotonic() + 30
    while replica.loop._ledger.open:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shown = [line for line in before.splitlines() if line.startswith(images)]
    assert shown[0] in http.get("/metrics").text, "nothing was drawn to its end for nobody"
