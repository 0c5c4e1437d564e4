"""The exact-hit cache: equal requests get equal bytes without drawing, and no others do."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.access.keys import make_key
from service.errors import Overloaded
from service.replica import Replica
from service.settings import MIB, load_settings
from service.web.app import build_app
from service.web.image_cache import ImageCache
from tests.engines.checkpoints import make_lora
from tests.service.access.test_safety import STRICT

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
PROMPT = "a red star"


def png(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


TEAL, PINK = png("teal"), png("pink")


@pytest.fixture(scope="module")
def replica(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Replica:
    folder = tmp_path_factory.mktemp("loras")
    values = {
        "model": str(lcm_checkpoint),
        "engine": "onnxruntime",
        "cache_dir": cache_dir,
        "loras": {"ink": make_lora(lcm_checkpoint, folder / "ink", ["to_q"])},
        "image_cache_bytes": MIB,
        "safety": "tests.service.access.test_safety:STRICT",
    }
    return Replica(load_settings(values))


@pytest.fixture(scope="module")
def http(replica: Replica) -> Iterator[TestClient]:
    with TestClient(build_app(replica)) as client:
        yield client


def draw(http: TestClient, path: str = GENERATIONS, **fields: Any) -> list[dict[str, Any]]:
    answer = http.post(path, json={"prompt": PROMPT, "num_inference_steps": 2} | fields)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def series(http: TestClient, name: str) -> float:
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def num_denoise_calls(http: TestClient) -> float:
    return series(http, "fourstep_denoise_step_seconds_count")


def test_an_equal_request_gets_the_same_bytes_without_drawing(http: TestClient) -> None:
    client = openai.OpenAI(api_key="none", base_url=f"{http.base_url}/v1", http_client=http)
    asked: dict[str, Any] = {"prompt": PROMPT, "n": 2, "extra_body": {"seed": 100}}
    first = client.images.generate(**asked).model_dump()
    calls, images = num_denoise_calls(http), series(http, "fourstep_images_total")
    hits = series(http, 'fourstep_image_cache_lookups_total{model="tiny-lcm",outcome="hit"}')
    again = client.images.generate(**asked).model_dump()
    assert num_denoise_calls(http) == calls
    assert series(http, "fourstep_images_total") == images + 2  # delivered all the same
    name = 'fourstep_image_cache_lookups_total{model="tiny-lcm",outcome="hit"}'
    assert series(http, name) == hits + 2
    assert series(http, "fourstep_image_cache_bytes") > 0
    assert [item.get("cached") for item in first["data"]] == [None, None]
    assert [item.pop("cached") for item in again["data"]] == [True, True]
    assert again["data"] == [
        {name: value for name, value in item.items() if name != "cached"} for item in first["data"]
    ]
    for name in ("size", "sampler", "num_inference_steps", "guidance_scale", "warnings"):
        assert again[name] == first[name]


def test_what_is_missing_is_drawn_beside_what_is_there(http: TestClient) -> None:
    (known,) = draw(http, seed=201)
    three = draw(http, seed=200, n=3)
    assert [item.get("cached", False) for item in three] == [False, True, False]
    assert three[1]["b64_json"] == known["b64_json"]
    assert len({item["b64_json"] for item in three}) == 3
    assert [item["seed"] for item in three] == [200, 201, 202]


# Field → two values that make two images.
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "prompt": ("a", "b"),
    "negative_prompt": ("a", "b"),  # this model draws without, but the file names it
    "seed": (1, 2),
    "size": ("64x64", "64x72"),
    "num_inference_steps": (1, 2),
    "guidance_scale": (8.5, 8.25),
    "sampler": ("ddim", "euler"),
    "loras": ([], [{"name": "ink"}]),
    "output_format": ("png", "webp"),
}
IN_EDITS: dict[str, tuple[Any, Any]] = {
    "strength": (0.5, 0.9),
    "image": (TEAL, PINK),
}
WITH: dict[str, tuple[dict[str, Any], tuple[Any, Any]]] = {
    "output_compression": ({"output_format": "jpeg"}, (20, 95)),
    "timesteps": ({}, ([999, 499], [999, 259])),
    "eta": ({"sampler": "ddim", "num_inference_steps": 3}, (0.0, 1.0)),
}


@pytest.mark.parametrize("field", [*DIFFERENT, *IN_EDITS, *WITH])
def test_another_value_of_any_field_is_another_image(http: TestClient, field: str) -> None:
    more, (one, other) = WITH.get(field, ({}, (DIFFERENT | IN_EDITS).get(field)))
    seed = 1000 + [*DIFFERENT, *IN_EDITS, *WITH].index(field)  # nothing else has drawn it
    path, body = GENERATIONS, {"seed": seed} | more
    if field in IN_EDITS:
        path, body = EDITS, body | {"image": TEAL, "num_inference_steps": 4}
    (of_one,) = draw(http, path, **body | {field: one})
    (of_other,) = draw(http, path, **body | {field: other})
    assert "cached" not in of_other
    assert of_other["b64_json"] != of_one["b64_json"]
    for value, drawn in ((one, of_one), (other, of_other)):
        (again,) = draw(http, path, **body | {field: value})
        assert (again.pop("cached"), again["b64_json"]) == (True, drawn["b64_json"])


def test_what_a_field_left_out_means_is_the_same_image(http: TestClient) -> None:
    (implied,) = draw(http, seed=400)
    (said,) = draw(
        http, seed=400, size="64x64", sampler="lcm", guidance_scale=8.5, user="alice", n=1,
        response_format="b64_json", priority="low",
    )  # fmt: skip
    assert (said.pop("cached"), said) == (True, implied)


def test_without_a_seed_nothing_is_kept_or_looked_up(http: TestClient) -> None:
    name = "fourstep_image_cache_lookups_total"
    before = series(http, name)
    seed = draw(http)[0]["seed"]
    assert series(http, name) == before
    assert "cached" not in draw(http, seed=seed)[0]


def events(http: TestClient, **fields: Any) -> list[dict[str, Any]]:
    text = http.post(GENERATIONS, json={"prompt": PROMPT, "stream": True} | fields).text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_streams_have_it_and_those_with_previews_do_not(http: TestClient) -> None:
    (drawn,) = events(http, seed=500)
    (again,) = events(http, seed=500)
    assert again["cached"] is True
    assert again["b64_json"] == drawn["b64_json"]
    assert again["type"] == "image_generation.completed"
    *previews, last = events(http, seed=500, partial_images=2)
    assert len(previews) == 2
    assert "cached" not in last
    assert last["b64_json"] == drawn["b64_json"]


def test_raw_images_say_it_in_their_head(http: TestClient) -> None:
    body = {"prompt": PROMPT, "seed": 600}
    headers = {"accept": "image/webp"}
    drawn, again = (http.post(GENERATIONS, json=body, headers=headers) for _ in range(2))
    assert "x-fourstep-cached" not in drawn.headers
    assert again.headers["x-fourstep-cached"] == "true"
    assert again.headers["x-fourstep-seed"] == "600"
    assert again.content == drawn.content


def test_a_hit_is_answered_when_nothing_more_can_be_drawn(
    http: TestClient, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    (drawn,) = draw(http, seed=700)

    def full(*_: object) -> None:
        raise Overloaded("full")

    monkeypatch.setattr(replica.loop, "check", full)
    monkeypatch.setattr(replica.loop, "submit", full)
    assert draw(http, seed=700)[0]["b64_json"] == drawn["b64_json"]
    for body in ({"seed": 701}, {"seed": 700, "n": 2}, {}):
        answer = http.post(GENERATIONS, json={"prompt": PROMPT, "num_inference_steps": 2} | body)
        assert answer.status_code == 429


def test_the_safety_filter_has_its_say(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STRICT, "blocked", frozenset({STRICT.num_seen}))
    shown = draw(http, seed=800, n=2)
    (withheld,) = [item for item in shown if item.get("filtered")]
    monkeypatch.setattr(STRICT, "blocked", frozenset())
    again = draw(http, seed=800, n=2)
    assert [item.get("cached", False) for item in again] == [item is not withheld for item in shown]
    seen = STRICT.num_seen
    answer = http.post(GENERATIONS, json={"prompt": "gore", "seed": 800})
    assert answer.json()["error"]["code"] == "content_policy_violation"
    assert STRICT.num_seen == seen


def test_a_hit_counts_against_what_a_key_may_have(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path: Path
) -> None:
    key, line = make_key("alice", {"images_per_minute": "3"})
    (tmp_path / "keys").write_text(line)
    values = {
        "model": str(lcm_checkpoint),
        "engine": "onnxruntime",
        "cache_dir": cache_dir,
        "api_keys_file": tmp_path / "keys",
        "image_cache_bytes": MIB,
    }
    headers = {"authorization": f"Bearer {key}"}
    with TestClient(build_app(Replica(load_settings(values))), headers=headers) as http:
        assert ["cached" in draw(http, seed=1)[0] for _ in range(3)] == [False, True, True]
        answer = http.post(GENERATIONS, json={"prompt": PROMPT, "seed": 1})
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"


def test_off_by_default(lcm_checkpoint: Path, cache_dir: Path) -> None:
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    with TestClient(build_app(Replica(load_settings(values)))) as http:
        drawn, again = (draw(http, seed=1) for _ in range(2))
    assert drawn == again
    assert "cached" not in again[0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=60))
def test_it_holds_the_last_used_within_its_bytes(uses: list[tuple[int, int]]) -> None:
    sizes: list[int] = []
    cache = ImageCache(100, observe_bytes=sizes.append)
    used: list[int] = []  # by last use, as a model of what must be there
    held: dict[int, bytes] = {}
    for name, size in uses:
        key = bytes([name])
        assert cache.get(key) == held.get(name)
        if name in held:
            used.append(used.pop(used.index(name)))
        else:
            cache.put(key, data := bytes(size))
            held[name] = data
            used.append(name)
            while sum(map(len, held.values())) > 100:
                del held[used.pop(0)]
            assert sizes[-1] == sum(map(len, held.values()))
    assert max(sizes, default=0) <= 100
