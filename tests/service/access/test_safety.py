"""The safety filter: refusals, black pictures, previews, counts; nothing leaves unchecked."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from fastapi.testclient import TestClient
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from service.access.safety import DiffusersChecker, Verdict
from service.replica import Replica
from service.settings import SettingsError, load_settings
from service.web.app import build_app


class Strict:
    """An operator's own: refuses a word, and the pictures whose numbers (in order) are named."""

    blocked: frozenset[int] = frozenset()
    fails = False

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.num_seen = 0

    def check_prompt(self, text: str) -> Verdict:
        self.threads.add(threading.current_thread().name)
        return Verdict("gore" not in text, "it asks for gore")

    def check_images(self, pixels: np.ndarray) -> list[Verdict]:
        self.threads.add(threading.current_thread().name)
        if self.fails:
            raise RuntimeError("the filter's own fault")
        assert pixels.dtype == np.uint8
        verdicts = []
        for _ in pixels:
            verdicts.append(Verdict(self.num_seen not in self.blocked))
            self.num_seen += 1
        return verdicts


STRICT = Strict()
NOT_A_FILTER = object()


def make_app(checkpoint: Path, cache_dir: Path, **values: Any) -> TestClient:
    settings = {"model": str(checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    return TestClient(build_app(Replica(load_settings(settings | values))))


@pytest.fixture(scope="module")
def http(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[TestClient]:
    values = {"safety": f"{__name__}:STRICT", "num_image_workers": 1}
    with make_app(lcm_checkpoint, cache_dir, **values) as client:
        yield client


@pytest.fixture
def client(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> openai.OpenAI:
    monkeypatch.setattr(STRICT, "num_seen", 0)
    return openai.OpenAI(
        api_key="none", base_url=f"{http.base_url}/v1", http_client=http, max_retries=0
    )


def picture(data: str | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data or ""))))


def counted(http: TestClient, stage: str, outcome: str) -> float:
    name = f'fourstep_safety_checks_total{{model="tiny-lcm",outcome="{outcome}",stage="{stage}"}} '
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(lines[0].removeprefix(name)) if lines else 0.0


def test_a_refused_prompt_is_openais_own_error(http: TestClient, client: openai.OpenAI) -> None:
    before = counted(http, "prompt", "filtered")
    with pytest.raises(openai.BadRequestError, match="refuses this prompt: it asks for gore") as e:
        client.images.generate(prompt="gore everywhere")
    assert (e.value.code, e.value.param) == ("content_policy_violation", "prompt")
    png = io.BytesIO()
    Image.new("RGB", (64, 64)).save(png, "PNG")
    with pytest.raises(openai.BadRequestError, match="it asks for gore"):
        client.images.edit(image=("x.png", png.getvalue()), prompt="more gore")
    assert counted(http, "prompt", "filtered") == before + 2
    assert STRICT.num_seen == 0  # nothing was drawn


def test_what_passes_is_as_without_a_filter(
    client: openai.OpenAI, lcm_checkpoint: Path, cache_dir: Path
) -> None:
    body = {"prompt": "a house", "seed": 5}
    answer = client.images.generate(prompt="a house", extra_body={"seed": 5})
    assert "filtered" not in (answer.data or [])[0].model_dump()
    with make_app(lcm_checkpoint, cache_dir) as plain:
        without = plain.post("/v1/images/generations", json=body).json()
        assert "fourstep_safety_checks_total{" not in plain.get("/metrics").text
    assert (answer.data or [])[0].b64_json == without["data"][0]["b64_json"]
    assert all(name.startswith("fourstep-image") for name in STRICT.threads)


def test_a_withheld_image_is_black_and_said_so(
    http: TestClient, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STRICT, "blocked", frozenset({1}))
    before = counted(http, "image", "filtered"), counted(http, "image", "passed")
    answer = client.images.generate(prompt="three houses", n=3, extra_body={"seed": 9})
    data = answer.data or []
    assert [item.model_dump().get("filtered") for item in data].count(True) == 1
    assert [item.model_dump()["seed"] for item in data] == [9, 10, 11]
    (index,) = (i for i, item in enumerate(data) if item.model_dump().get("filtered"))
    assert [not picture(item.b64_json).any() for item in data].count(True) == 1
    assert not picture(data[index].b64_json).any()
    (warning,) = answer.model_dump()["warnings"]
    assert warning == f"the safety filter withheld image {index} (from 0): it is black"
    after = counted(http, "image", "filtered"), counted(http, "image", "passed")
    assert after == (before[0] + 1, before[1] + 2)


@pytest.mark.parametrize("stream", [False, True])
def test_where_nothing_is_left_it_is_an_error(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(STRICT, "blocked", frozenset(range(100)))
    seen: list[Any] = []
    with pytest.raises(openai.APIError, match="withheld what was drawn") as error:
        seen.extend(client.images.generate(prompt="two houses", n=2, stream=stream))
    assert seen == []
    assert error.value.code == "content_policy_violation"


def test_a_raw_body_is_never_black(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STRICT, "blocked", frozenset(range(10**6)))
    headers = {"accept": "image/png"}
    answer = http.post("/v1/images/generations", json={"prompt": "a house"}, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "content_policy_violation"


def test_previews_pass_through_it_too(
    http: TestClient, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STRICT, "blocked", frozenset({0, 1}))  # both previews; the image passes
    before = counted(http, "preview", "filtered")
    events = list(client.images.generate(prompt="a house", stream=True, partial_images=2))
    assert [event.type for event in events] == ["image_generation.completed"]
    assert counted(http, "preview", "filtered") == before + 2


def test_a_stream_keeps_back_a_black_picture_until_one_passes(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STRICT, "blocked", frozenset({0}))
    events = list(client.images.generate(prompt="two houses", n=2, stream=True))
    assert [event.model_dump().get("filtered") for event in events] == [None, True]
    assert not picture(events[1].b64_json).any()  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_a_filter_that_fails_lets_nothing_through(
    http: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    monkeypatch.setattr(STRICT, "fails", True)
    before = counted(http, "image", "error")
    body = {"prompt": "a house", "stream": stream}
    answer = http.post("/v1/images/generations", json=body)
    assert "nothing is delivered unchecked" in answer.text
    assert "safety_filter_failure" in answer.text
    assert "b64_json" not in answer.text
    assert "own fault" not in answer.text
    assert "own fault" in caplog.text
    assert stream or answer.status_code == 500
    assert counted(http, "image", "error") == before + 1


# -- diffusers' checker --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checker in a checkpoint's layout, that finds nothing or everything."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = CLIPConfig(vision_config=vision, projection_dim=16)
    folder = tmp_path_factory.mktemp("checkpoint")
    model = StableDiffusionSafetyChecker(config)
    torch.nn.init.normal_(model.concept_embeds)
    model.concept_embeds_weights.data.fill_(2.0)  # no cosine is as large: nothing is found
    model.save_pretrained(folder / "safety_checker")
    size = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder / "feature_extractor")
    return folder


@pytest.fixture(scope="module")
def finds_everything(checker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one folder, with thresholds that every cosine exceeds."""
    folder = tmp_path_factory.mktemp("flat")
    model = StableDiffusionSafetyChecker.from_pretrained(checker / "safety_checker")
    model.concept_embeds_weights.data.fill_(-2.0)
    model.save_pretrained(folder)
    CLIPImageProcessor.from_pretrained(checker / "feature_extractor").save_pretrained(folder)
    return folder


def test_diffusers_checker_judges_as_its_own_pipeline_does(checker: Path) -> None:
    torch.manual_seed(1)
    folder_model = StableDiffusionSafetyChecker.from_pretrained(checker / "safety_checker")
    processor = CLIPImageProcessor.from_pretrained(checker / "feature_extractor")
    ours = DiffusersChecker(checker)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), np.uint8)
    pixels[::2] //= 8
    inputs = processor([Image.fromarray(each) for each in pixels], return_tensors="pt").pixel_values
    embeds = folder_model.visual_projection(folder_model.vision_model(inputs)[1]).detach()
    cosines = torch.nn.functional.cosine_similarity(
        embeds[:, None], folder_model.concept_embeds[None], dim=-1
    )
    threshold = cosines.max(dim=1).values.median().item()  # about half are found
    for model in (folder_model, ours._checker):
        model.concept_embeds_weights.data.fill_(threshold)
    _, theirs = folder_model(clip_input=inputs, images=[each.copy() for each in pixels])
    assert [not verdict.allowed for verdict in ours.check_images(pixels)] == theirs
    assert 0 < sum(theirs) < len(theirs)
    assert ours.check_prompt("anything").allowed


def test_diffusers_checker_serves(
    lcm_checkpoint: Path, cache_dir: Path, checker: Path, finds_everything: Path
) -> None:
    body = {"prompt": "a house", "num_inference_steps": 1}
    for folder, status in ((checker, 200), (finds_everything, 400)):
        values = {"safety": "diffusers", "safety_model": folder}
        with make_app(lcm_checkpoint, cache_dir, **values) as client:
            answer = client.post("/v1/images/generations", json=body)
            assert answer.status_code == status, answer.text


def test_a_pickled_checker_is_refused(checker: Path, tmp_path: Path) -> None:
    model = StableDiffusionSafetyChecker.from_pretrained(checker / "safety_checker")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    CLIPImageProcessor.from_pretrained(checker / "feature_extractor").save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="no safety checker in safetensors"):
        DiffusersChecker(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"safety": "diffusers"}, "safety_model is not set"),
        ({"safety": "strict"}, "write 'diffusers' or 'module:attribute'"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Filter", "No module named 'no_such_module'; it must be importable"),
        (f"{__name__}:Missing", "has no attribute 'Missing'"),
        (f"{__name__}:NOT_A_FILTER", r"has no check_prompt\(text\) and check_images\(pixels\)"),
    ],
)
def test_a_hook_that_is_none_is_named(
    lcm_checkpoint: Path, cache_dir: Path, name: str, message: str
) -> None:
    with (
        pytest.raises(SettingsError, match=message),
        make_app(lcm_checkpoint, cache_dir, safety=name),
    ):
        pass


def test_a_class_is_made_once(lcm_checkpoint: Path, cache_dir: Path) -> None:
    with make_app(lcm_checkpoint, cache_dir, safety=f"{__name__}:Strict") as client:
        answer = client.post("/v1/images/generations", json={"prompt": "gore"})
        assert answer.json()["error"]["code"] == "content_policy_violation"
