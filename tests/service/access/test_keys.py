"""API keys: who gets in, who does not and why, and that no restart is needed to change them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from service.access import keys
from service.access.keys import KeyFileError, KeyRing, make_key
from service.cli import app as command
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app

KEY, LINE = make_key("alice")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# who may draw\n\n{LINE}\n")
    return path


@pytest.fixture(scope="module")
def http(lcm_checkpoint: Path, cache_dir: Path, file: Path) -> Iterator[TestClient]:
    settings = load_settings(
        {
            "model": str(lcm_checkpoint),
            "engine": "onnxruntime",
            "cache_dir": cache_dir,
            "api_keys_file": file,
        }
    )
    with TestClient(build_app(Replica(settings))) as client:
        yield client


def _client(http: TestClient, key: str) -> openai.OpenAI:
    return openai.OpenAI(
        api_key=key, base_url=f"{http.base_url}/v1", http_client=http, max_retries=0
    )


def test_the_key_opens_and_its_name_is_logged(
    http: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fourstep.access"):
        assert _client(http, KEY).images.generate(prompt="a cube").data
        assert _client(http, KEY).models.list().data
    assert [record.fields["key"] for record in caplog.records] == ["alice", "alice"]  # type: ignore[attr-defined]
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    "key",
    ["wrong", KEY[:-1], KEY.upper(), LINE.split(":")[1], LINE],
    ids=[
        "wrong",
        "shortened",
        "upper case",
        "its hash",
        "its line",
    ],  # the key is another each time
)
def test_any_other_key_is_refused(http: TestClient, key: str) -> None:
    with pytest.raises(openai.AuthenticationError, match="not known here") as refused:
        _client(http, key).images.generate(prompt="a cube")
    assert refused.value.code == "invalid_api_key"
    assert refused.value.response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {KEY}", KEY],
    ids=["none", "empty", "scheme", "scheme and space", "another scheme", "bare key"],
)
def test_without_a_key_nothing_is_read(http: TestClient, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for path in ("/v1/images/generations", "/v1/images/edits"):
        answer = http.post(path, headers=headers, content=b"{broken")  # with a key it would be 400
        assert answer.status_code == 401
        assert "Authorization: Bearer" in answer.json()["error"]["message"]
    assert http.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/", "/docs", "/openapi.json"])
def test_probes_metrics_and_pages_need_none(http: TestClient, path: str) -> None:
    assert http.get(path).status_code == 200


def test_keys_change_without_a_restart(
    http: TestClient, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "RELOAD_S", 0.0)
    before = file.read_text()
    other, line = make_key("bob")

    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return http.get("/v1/models", headers=headers).status_code

    def replace(text: str) -> None:  # as an editor or a mounted secret does: by another file
        partial = file.with_suffix(".new")
        partial.write_text(text)
        partial.replace(file)

    assert (status(KEY), status(other)) == (200, 401)
    replace(f"{line}\n")
    assert (status(KEY), status(other)) == (401, 200)
    replace("rubbish")
    assert (status(KEY), status(other)) == (401, 200)
    assert "line 1: not NAME:SHA256" in caplog.text
    file.unlink()
    assert status(other) == 200
    replace(before)
    assert (status(KEY), status(other)) == (200, 401)


@pytest.mark.parametrize("line", ["alice", "alice:abc", f"a b:{'0' * 64}", f"a:{'G' * 64}"])
def test_a_bad_key_file_is_named_by_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{LINE}\n{line}\n")
    with pytest.raises(KeyFileError, match=r"line 2: .*fourstep key NAME"):
        KeyRing(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api-keys", "/nowhere/keys"], "/nowhere/keys: No such file"),
        (["--host", "0.0.0.0"], "asks for no API key and --host lets other machines in"),
    ],
)
def test_serve_refuses_before_anything_starts(options: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "serve", "--port", "8766", *options],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stdout == ""


def test_a_key_file_named_by_the_environment_counts_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "serve", "--port", "8766"],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "FOURSTEP_API_KEYS_FILE": "/nowhere/keys"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "/nowhere/keys: No such file" in done.stderr


def test_the_command_makes_a_key_that_opens(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["key", "carol"])
    assert result.exit_code == 0
    (tmp_path / "keys").write_text(result.stdout)
    secret = result.stderr.split()[0]
    owner = KeyRing(tmp_path / "keys").owner_of(secret)
    assert owner is not None
    assert owner.name == "carol"
    assert secret not in result.stdout
    refused = CliRunner().invoke(command, ["key", "a b"])
    assert refused.exit_code == 2
    assert "1 to 64 letters" in refused.output


@pytest.fixture
def limited(lcm_checkpoint: Path, cache_dir: Path, tmp_path: Path) -> Iterator[openai.OpenAI]:
    """The client of a key that may have four images a minute, at normal priority."""
    key, line = make_key("dave", {"images_per_minute": "4"})
    (tmp_path / "keys").write_text(line)
    values = {"model": str(lcm_checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    settings = load_settings(values | {"api_keys_file": tmp_path / "keys"})
    with TestClient(build_app(Replica(settings))) as http:
        yield _client(http, key)


def test_a_key_has_its_images_a_minute_and_no_more(limited: openai.OpenAI) -> None:
    assert len(limited.images.generate(prompt="a cube", n=3).data or []) == 3
    with pytest.raises(openai.RateLimitError, match="4 images a minute and has had") as refused:
        limited.images.generate(prompt="a cube", n=2)
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 16
    assert len(limited.images.generate(prompt="a cube").data or []) == 1
    with pytest.raises(openai.BadRequestError, match="n is 5; this API key may have 4"):
        limited.images.generate(prompt="a cube", n=5)


def test_a_key_asks_for_no_more_priority_than_it_has(limited: openai.OpenAI) -> None:
    answer = limited.images.with_raw_response.generate(
        prompt="a cube", extra_body={"priority": "high"}
    )
    (warning,) = answer.http_response.json()["warnings"]
    assert warning == "priority is 'high'; this API key has normal at most"


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1//models", "/V1/models", "/v1/./models", "/x/../v1/models", "/%761/models",
     "/v1%2fmodels", "/v1/models/", "/v1/models%00", "/;/v1/models", "/v1\\models",
     "/v1/%6dodels", "/%2e/v1/models", "/v1/models.", "/v1./models", "/v1;/models",
     "/v1;a=b/models", "/v1/models;a", "/v1/models%20", "/v1/MODELS", "/v1%00/models",
     "/v1/x/../models", "/.//v1/models", "/v1/images/files/../../models",
     "/v1/images/files/%2e%2e/%2e%2e/models", "/v1/images%2ffiles/../../models"],
)  # fmt: skip
def test_no_way_of_writing_a_path_goes_past_the_keys(http: TestClient, path: str) -> None:
    """Whatever form reaches a protected route is protected; the others are no paths here."""
    answer = http.get(f"http://testserver{path}", follow_redirects=True)
    assert answer.status_code in (401, 404)
    assert "data" not in answer.json()
