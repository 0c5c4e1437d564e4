"""What browsers are told, which origins may ask, and what is never read from a checkpoint."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import expect
from safetensors.torch import load_file
from torch import save

from engines.build.checkpoint import load_pipeline
from engines.errors import CheckpointError
from service.access.keys import make_key
from service.replica import Replica
from service.settings import SettingsError, load_settings
from service.web.app import build_app
from service.web.headers import EXPOSED
from service.web.pages import content_security_policy
from tests.service.web.test_studio import CHROMIUM, serving, studio

SHOP = "https://shop.example"
KEY, LINE = make_key("shop")


def client(checkpoint: Path, cache_dir: Path, **values: Any) -> TestClient:
    settings = {"model": str(checkpoint), "engine": "onnxruntime", "cache_dir": cache_dir}
    return TestClient(build_app(Replica(load_settings(settings | values))))


@pytest.fixture(scope="module")
def http(lcm_checkpoint: Path, cache_dir: Path) -> Iterator[TestClient]:
    with client(lcm_checkpoint, cache_dir) as opened:
        yield opened


@pytest.fixture(scope="module")
def service(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    """A service with keys that pages of SHOP may use."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(LINE)
    values = {"api_keys_file": keys, "cors_origins": [SHOP], "max_body_bytes": 2000}
    with client(lcm_checkpoint, cache_dir, **values) as opened:
        yield opened


IMAGE = {"prompt": "x", "num_inference_steps": 1}
EXCHANGES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "json": ("POST", "/v1/images/generations", {"json": IMAGE}, 200),
    "raw": ("POST", "/v1/images/generations",
            {"json": IMAGE, "headers": {"accept": "image/png"}}, 200),
    "stream": ("POST", "/v1/images/generations", {"json": IMAGE | {"stream": True}}, 200),
    "models": ("GET", "/v1/models", {}, 200),
    "refused": ("POST", "/v1/images/generations", {"json": {}}, 400),
    "no path": ("GET", "/nothing", {}, 404),
    "no method": ("GET", "/v1/images/edits", {}, 405),
    "probe": ("GET", "/healthz", {}, 200),
    "metrics": ("GET", "/metrics", {}, 200),
    "document": ("GET", "/openapi.json", {}, 200),
}  # fmt: skip


@pytest.mark.parametrize("name", EXCHANGES)
def test_every_answer_has_the_headers(http: TestClient, name: str) -> None:
    method, path, options, status = EXCHANGES[name]
    answer = http.request(method, path, **options)
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert answer.headers.get_list("cache-control") == ["no-store"]


def test_an_unforeseen_error_has_them_too(
    http: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("service.web.api.admit", fails)
    answer = http.post("/v1/images/generations", json=IMAGE, headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_failure"
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_run_their_own_scripts_and_no_others(http: TestClient, path: str) -> None:
    answer = http.get(path)
    policy = answer.headers["content-security-policy"]
    assert policy == content_security_policy(answer.text)
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    changed = answer.text.replace("</script>", ";alert(1)</script>")
    assert content_security_policy(changed) != policy


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
def test_the_api_reference_works_under_its_policy(lcm_checkpoint: Path, cache_dir: Path) -> None:
    with serving(model=str(lcm_checkpoint), cache_dir=cache_dir) as url, studio(url) as page:
        refused: list[str] = []
        page.on(
            "console",
            lambda line: (
                refused.append(f"{line.text}: {line.location}") if line.type == "error" else None
            ),
        )
        page.goto(f"{url}/docs")
        page.locator("[data-path='/v1/images/generations']").click()
        expect(page.get_by_text("num_inference_steps").first).to_be_visible()
        assert refused == []


def test_other_origins_are_told_nothing_by_default(http: TestClient) -> None:
    answer = http.get("/v1/models", headers={"origin": SHOP})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = {"origin": SHOP, "access-control-request-method": "POST"}
    answer = http.options("/v1/images/generations", headers=preflight)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_pages_of_a_named_origin_may_draw(service: TestClient) -> None:
    asked = "authorization,content-type,x-request-timeout,x-stainless-lang"
    preflight = {
        "origin": SHOP,
        "access-control-request-method": "POST",
        "access-control-request-headers": asked,
    }
    answer = service.options("/v1/images/generations", headers=preflight)  # browsers send no key
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == SHOP
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == asked
    headers = {"origin": SHOP, "authorization": f"Bearer {KEY}"}
    answer = service.post("/v1/images/generations", json=IMAGE, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == SHOP
    assert answer.headers["access-control-expose-headers"] == ", ".join(EXPOSED)
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    ("key", "size", "status"),
    [("wrong", 10, 401), (KEY, 3000, 413)],
    ids=["key", "size"],
)
def test_a_page_can_read_why_it_was_refused(
    service: TestClient, key: str, size: int, status: int
) -> None:
    headers = {"origin": SHOP, "authorization": f"Bearer {key}"}
    answer = service.post("/v1/images/generations", content=b"x" * size, headers=headers)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == SHOP


def test_pages_of_other_origins_may_not(service: TestClient) -> None:
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = service.options("/v1/images/generations", headers=preflight)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
    answer = service.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["shop.example", "https://shop.example/", "null", "https://*"])
def test_what_is_no_origin_is_named(origin: str) -> None:
    with pytest.raises(SettingsError, match="is no origin: write scheme, host and port"):
        load_settings({"cors_origins": [origin]})


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_pickled_weights_are_refused(lcm_checkpoint: Path, tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(lcm_checkpoint, folder)
    for path in folder.rglob("*.safetensors"):
        save(load_file(path), path.with_suffix(suffix))
        path.unlink()
    with pytest.raises(CheckpointError, match=r"safetensors"):
        load_pipeline(folder, "fp32")


def test_one_pickled_part_is_refused_too(lcm_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(lcm_checkpoint, folder)
    (path,) = (folder / "unet").glob("*.safetensors")
    save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded|safetensors"):
        load_pipeline(folder, "fp32")


def test_code_in_a_checkpoint_never_runs(lcm_checkpoint: Path, tmp_path: Path) -> None:
    folder, trace = tmp_path / "custom", tmp_path / "it-ran"
    shutil.copytree(lcm_checkpoint, folder)
    code = f"open({str(trace)!r}, 'w')\nclass MyUNet: pass\nclass MyPipeline: pass\n"
    (folder / "unet" / "my_unet.py").write_text(code)
    (folder / "pipeline.py").write_text(code)
    index = (folder / "model_index.json").read_text()
    index = index.replace('"UNet2DConditionModel"', '"MyUNet"')
    (folder / "model_index.json").write_text(
        index.replace('"diffusers",\n    "MyUNet"', '"my_unet",\n    "MyUNet"')
    )
    assert "my_unet" in (folder / "model_index.json").read_text()
    with pytest.raises(CheckpointError):
        load_pipeline(folder, "fp32")
    assert not trace.exists()


def test_nothing_here_trusts_remote_code_or_unpickles() -> None:
    root = Path(__file__).parents[3]
    files = [*root.glob("engines/**/*.py"), *root.glob("service/**/*.py")]
    assert Path(load_settings.__code__.co_filename) in files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword):
                assert node.arg not in ("trust_remote_code", "custom_pipeline"), path
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {each.arg: ast.unparse(each.value) for each in node.keywords}
                assert options.get("weights_only") == "True", path
