"""`response_format` `url`: images kept in a folder that all replicas share, within its limits."""

from __future__ import annotations

import base64
import io
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from playwright.sync_api import sync_playwright

from service.access.keys import make_key
from service.replica import Replica
from service.settings import MIB, SettingsError, load_settings
from service.web.app import build_app
from service.web.image_files import ImageFiles
from tests.service.web.test_studio import CHROMIUM, serving

KEY, LINE = make_key("alice")
GENERATIONS = "/v1/images/generations"
URL_BODY = {"prompt": "a red star", "num_inference_steps": 1, "response_format": "url"}


def files_in(folder: Path, **options: Any) -> ImageFiles:
    return ImageFiles(folder, **({"life_s": 3600, "max_bytes": MIB} | options))


def on_disk(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_what_one_replica_keeps_every_other_answers(tmp_path: Path) -> None:
    folder = tmp_path / "below" / "images"
    one, other = files_in(folder), files_in(folder)
    names = [one.keep(b"png %d" % index, "png") for index in range(50)]
    for index, name in enumerate(names):
        assert name is not None
        found = other.read(name)
        assert found is not None
        assert (found.data, found.media_type) == (b"png %d" % index, "image/png")
        assert 3590 < found.left_s <= 3600
    assert len(set(names)) == 50
    assert all(len(base64.urlsafe_b64decode(str(name)[:32])) == 24 for name in names)  # 192 bits
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # nobody else on the machine lists it


@pytest.mark.parametrize(
    "name", ["", "..", "../secret.png", "x.png", f"{'a' * 32}.gif", f"{'a' * 32}.png"]
)
def test_no_other_name_reads_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(b"not of this service")
    assert files_in(tmp_path / "images").read(name) is None


def test_an_expired_file_is_answered_no_more_and_swept(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    files = files_in(tmp_path, observe=lambda *counts: seen.append(counts))
    old, new = files.keep(b"old", "png"), files.keep(b"newer", "webp")
    assert old is not None
    assert new is not None
    age(tmp_path / old, 3601)
    assert files.read(old) is None
    files.sweep()
    assert on_disk(tmp_path) == {new}
    assert seen[-1] == (1, 5)


def test_a_file_lives_as_long_as_was_said_whoever_sweeps(tmp_path: Path) -> None:
    """Two services of one cache folder, or one that comes back with another setting."""
    hour, moment = files_in(tmp_path), files_in(tmp_path, life_s=1e-3)
    kept, gone = hour.keep(b"x", "png"), moment.keep(b"y", "png")
    assert kept is not None
    assert gone is not None
    time.sleep(0.01)
    moment.sweep()
    assert on_disk(tmp_path) == {kept}
    found = moment.read(kept)
    assert found is not None
    assert 3590 < found.left_s <= 3600


def test_a_file_that_is_being_written_makes_no_room(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    running = f"{'a' * 32}.png.part"
    (tmp_path / running).write_bytes(b"x" * (MIB // 4))
    kept = files.keep(b"y" * (MIB // 2), "png")
    files.sweep(room_bytes=MIB // 2)
    assert kept not in on_disk(tmp_path)
    assert running in on_disk(tmp_path)


def test_the_thread_sweeps_by_itself(tmp_path: Path) -> None:
    swept = threading.Event()
    files = files_in(tmp_path, life_s=0.01, observe=lambda num, _: num or swept.set())
    name = files.keep(b"x", "png")
    assert name is not None
    age(tmp_path / name, 1)
    files.start()
    assert swept.wait(30)
    files.close()
    assert on_disk(tmp_path) == set()


def test_a_killed_write_leaves_nothing_for_long_and_foreign_files_stay(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    unfinished, running = (f"{letter * 32}.png.part" for letter in "ab")
    for name in (unfinished, running, "notes.txt", f"{'c' * 31}.png"):
        (tmp_path / name).write_bytes(b"x")
        age(tmp_path / name, 0 if name == running else 7200)
    assert files.read(unfinished) is None
    files.sweep()
    assert on_disk(tmp_path) == {running, "notes.txt", f"{'c' * 31}.png"}


@pytest.mark.parametrize("num_replicas", [1, 8])
def test_the_oldest_go_before_the_limit_is_passed(tmp_path: Path, num_replicas: int) -> None:
    replicas = [files_in(tmp_path) for _ in range(num_replicas)]
    data, names = b"x" * (MIB // 100), []
    for index in range(300):
        names.append(replicas[index % num_replicas].keep(data, "png"))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= MIB
    kept = on_disk(tmp_path)
    assert len(kept) > 60
    assert kept == set(names[-len(kept) :])
    assert replicas[0].keep(b"x" * MIB, "png") is None  # would push out all others
    assert on_disk(tmp_path) == kept


def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert files_in(tmp_path).keep(b"xyz", "png") is None
    assert on_disk(tmp_path) == set()
    assert "No space left" in caplog.text


# -- over HTTP ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(LINE)
    return {
        "model": str(lcm_checkpoint),
        "engine": "onnxruntime",
        "cache_dir": cache_dir,
        "api_keys_file": keys,
        "image_files_dir": tmp_path_factory.mktemp("images"),
    }


def replica_client(settings: dict[str, Any]) -> TestClient:
    return TestClient(build_app(Replica(load_settings(settings))))


@pytest.fixture(scope="module")
def http(settings: dict[str, Any]) -> Iterator[TestClient]:
    with replica_client(settings) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(
        api_key=KEY, base_url=f"{http.base_url}/v1", http_client=http, max_retries=0
    )


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_the_openai_client_gets_urls_that_anyone_can_open(
    http: TestClient, client: openai.OpenAI, output_format: Any
) -> None:
    asked = {"prompt": "a red star", "n": 2, "output_format": output_format}
    extra = {"seed": 7, "num_inference_steps": 1}
    kept = client.images.generate(**asked, response_format="url", extra_body=extra).data or []
    plain = client.images.generate(**asked, extra_body=extra).data or []
    assert len({item.url for item in kept}) == 2
    for item, expected in zip(kept, plain, strict=True):
        assert item.b64_json is None
        head = http.head(str(item.url))  # as chat programs do before they show one
        assert head.status_code == 200
        assert head.headers["content-type"] == f"image/{output_format}"
        answer = http.get(str(item.url))  # without a key
        assert answer.status_code == 200
        assert answer.content == base64.b64decode(expected.b64_json or "")
        assert answer.headers["content-type"] == f"image/{output_format}"
        assert Image.open(io.BytesIO(answer.content)).format == output_format.upper()
        private = re.fullmatch(
            r"private, max-age=(\d+), immutable", answer.headers["cache-control"]
        )
        assert private
        assert 3500 < int(private[1]) <= 3600
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_edits_have_urls_too(http: TestClient, client: openai.OpenAI) -> None:
    edited = (
        client.images.edit(image=("x.png", png()), prompt="y", response_format="url").data or []
    )
    assert Image.open(io.BytesIO(http.get(str(edited[0].url)).content)).size == (64, 64)


def test_an_unknown_or_expired_file_is_openais_404(
    http: TestClient, client: openai.OpenAI, settings: dict[str, Any]
) -> None:
    answer = client.images.generate(prompt="x", response_format="url").data or []
    url = str(answer[0].url)
    name = url.rpartition("/")[2]
    age(settings["image_files_dir"] / name, 3601)
    for each in (url, "/v1/images/files/nothing.png"):
        gone = http.get(each)
        assert gone.status_code == 404
        wanted = each.rpartition("/")[2]
        assert gone.json()["error"] == {
            "message": f"image file '{wanted}' is expired or unknown; they are kept for 3600 s",
            "type": "invalid_request_error",
            "param": None,
            "code": "not_found",
        }
        assert gone.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["%2e%2e/generations", "..%2fgenerations", "%2e%2e%2f%2e%2e/models"]
)
def test_without_a_key_the_files_lead_nowhere_else(http: TestClient, path: str) -> None:
    for method in ("GET", "POST"):
        answer = http.request(method, f"/v1/images/files/{path}", json={"prompt": "x"})
        assert answer.status_code in (404, 405)
    assert http.get("/v1/models").status_code == 401


def test_a_replica_answers_for_what_another_drew_and_after_its_end(
    http: TestClient, client: openai.OpenAI, settings: dict[str, Any]
) -> None:
    urls = []
    with replica_client(settings) as other:
        headers = {"authorization": f"Bearer {KEY}"}
        answer = other.post(GENERATIONS, json=URL_BODY, headers=headers).json()
        urls.append(answer["data"][0]["url"])
        drawn = client.images.generate(prompt="y", response_format="url").data or []
        urls.append(drawn[0].url)
        assert [other.get(url).status_code for url in urls] == [200, 200]
    assert [http.get(url).status_code for url in urls] == [200, 200]


def test_the_folder_is_counted_and_its_names_stay_out_of_the_log(
    http: TestClient,
    client: openai.OpenAI,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "fourstep.access"):
        (item,) = client.images.generate(prompt="x", response_format="url").data or []
        http.get(str(item.url))
    paths = [record.fields["path"] for record in caplog.records if hasattr(record, "fields")]
    assert paths[-1] == "/v1/images/files/..."
    assert str(item.url).rpartition("/")[2] not in str([vars(record) for record in caplog.records])
    metrics = http.get("/metrics").text
    assert 'fourstep_image_files{model="tiny-lcm"}' in metrics
    assert 'fourstep_image_files_bytes{model="tiny-lcm"}' in metrics


def test_a_folder_that_cannot_be_written_costs_no_answer(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with replica_client(settings | {"image_files_dir": tmp_path / "file"}) as http:
        headers = {"authorization": f"Bearer {KEY}"}
        answer = http.post(GENERATIONS, json=URL_BODY, headers=headers).json()
    assert answer["data"][0]["url"].startswith("data:image/png;base64,")
    (warning,) = answer["warnings"]
    assert "could not be kept" in warning


def test_switched_off_a_url_is_the_image_itself(settings: dict[str, Any]) -> None:
    values = settings | {"image_files_s": 0, "public_url": "https://images.example"}
    with replica_client(values) as http:
        headers = {"authorization": f"Bearer {KEY}"}
        answer = http.post(GENERATIONS, json=URL_BODY, headers=headers).json()
        url = answer["data"][0]["url"]
        assert url.startswith("data:image/png;base64,")
        decoded = base64.b64decode(url.partition(",")[2])
        assert Image.open(io.BytesIO(decoded)).size == (64, 64)
        assert answer["warnings"] == []
        gone = http.get(f"/v1/images/files/{'a' * 32}.png")
        assert (gone.status_code, "none are kept here" in gone.text) == (404, True)


def test_a_stream_says_that_it_has_no_urls(http: TestClient) -> None:
    body = URL_BODY | {"stream": True}
    text = http.post(GENERATIONS, json=body, headers={"authorization": f"Bearer {KEY}"}).text
    assert "response_format has no effect on a stream: its events carry b64_json" in text


def test_a_url_is_where_the_client_reached_the_service(settings: dict[str, Any]) -> None:
    """uvicorn believes X-Forwarded-Proto of a proxy on its own machine, as the tests are."""
    values = {name: value for name, value in settings.items() if name != "engine"}
    headers = {"authorization": f"Bearer {KEY}"}

    def drawn(at: str, **more: str) -> str:
        sent = headers | {name.replace("_", "-"): value for name, value in more.items()}
        answer = httpx.post(f"{at}{GENERATIONS}", json=URL_BODY, headers=sent, timeout=60)
        return str(answer.json()["data"][0]["url"])

    with serving(**values) as url:
        assert drawn(url).startswith(f"{url}/v1/images/files/")
        proxied = drawn(url, host="images.example", x_forwarded_proto="https")
        assert proxied.startswith("https://images.example/v1/images/files/")
        assert drawn(url, x_forwarded_host="evil.example").startswith(f"{url}/")
    with serving(**values, public_url="https://example.org/draw/") as url:
        assert drawn(url).startswith("https://example.org/draw/v1/images/files/")


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
def test_a_browser_opens_the_url(settings: dict[str, Any]) -> None:
    values = {name: value for name, value in settings.items() if name != "engine"}
    with serving(**values) as url, sync_playwright() as playwright:
        headers = {"authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{url}{GENERATIONS}", json=URL_BODY, headers=headers, timeout=60)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(answer.json()["data"][0]["url"])
        assert page.evaluate("document.images[0].naturalWidth") == 64
        assert page.evaluate("document.contentType") == "image/png"
        browser.close()


@pytest.mark.parametrize("url", ["images.example", "https://", "ftp://x", "https://x/?a=1"])
def test_what_is_no_base_url_is_named(url: str) -> None:
    with pytest.raises(SettingsError, match="is no base url: write scheme, host"):
        load_settings({"public_url": url})
