"""The studio page in a real browser: the first thing a newcomer sees after `make serve`."""

from __future__ import annotations

import base64
import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from service.access.keys import make_key
from service.replica import Replica
from service.settings import load_settings
from service.web.app import build_app
from tests.service.web.gate import Gate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
ARGUMENTS = (
    "--no-sandbox",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # as if there were no other host
    "--use-fake-device-for-media-stream",  # a webcam that shows a clock
    "--use-fake-ui-for-media-stream",
)
pytestmark = NEEDS_CHROMIUM
expect.set_options(timeout=30_000)  # a machine that other tests keep busy draws late


@contextlib.contextmanager
def serving(*, at_port: int = 0, **values: Any) -> Iterator[str]:
    """The URL of a service, on a port of its own if none is given."""
    app = build_app(Replica(load_settings({"engine": "onnxruntime", **values})))
    server = uvicorn.Server(uvicorn.Config(app, port=at_port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.05)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join()


@contextlib.contextmanager
def studio(url: str, **options: Any) -> Iterator[Page]:
    """The page, opened as a device with these options (Playwright's) shows it.

    Afterwards no script failed, no file was missed, no other host asked, the policy not met.
    """
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(**options)
        page.on(
            "console",
            lambda line: "Content Security" not in line.text or problems.append(line.text),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith(("data:", f"blob:{url}", url))
                or problems.append(f"asked {urlsplit(request.url).hostname}")
            ),
        )
        page.on(
            "websocket",
            lambda socket: (
                socket.url.startswith(url.replace("http", "ws"))
                or problems.append(f"asked {urlsplit(socket.url).hostname}")
            ),
        )
        page.on(
            "response",
            lambda response: (
                response.status != 404 or problems.append(f"nothing at {response.url}")
            ),
        )
        page.goto(url)
        yield page
        browser.close()
    assert problems == []


@pytest.fixture(scope="module")
def url(lcm_checkpoint: Path, cache_dir: Path, gate: Gate) -> Iterator[str]:
    with serving(model=str(lcm_checkpoint), cache_dir=cache_dir) as url:
        yield url


@pytest.fixture
def page(url: str) -> Iterator[Page]:
    with studio(url) as page:
        expect(page.locator("#model")).to_contain_text("onnxruntime")
        yield page


def test_a_prompt_becomes_the_pictures_the_api_gives(page: Page, url: str) -> None:
    values = {"prompt": "a large teal house", "steps": "3", "size": "64x96", "count": "2"}
    expect(page.locator("#prompt")).not_to_be_empty()  # an example of the page's own
    for name, value in (values | {"seed": "7"}).items():
        page.locator(f"#{name}").fill(value)
    page.locator("#sampler").select_option("ddim")
    page.locator("#draw").click()
    expect(page.locator("#message")).to_contain_text("ms in all")
    images = page.locator("figure:not(.preview) img")
    expect(images).to_have_count(2)
    sizes = images.evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight])")
    assert sizes == [[64, 96]] * 2
    request = {
        "prompt": values["prompt"], "num_inference_steps": 3, "size": "64x96", "n": 2, "seed": 7,
        "sampler": "ddim", "guidance_scale": float(page.locator("#guidance").input_value()),
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/images/generations", json=request, timeout=60).json()
    shown = {
        page.locator("figcaption").nth(i).inner_text().split(",")[0]: images.nth(i)
        for i in range(2)
    }
    for item in answer["data"]:
        data = (shown[f"seed {item['seed']}"].get_attribute("src") or "").split(",")[1]
        assert base64.b64decode(data) == base64.b64decode(item["b64_json"])


def test_timings_are_drawn_under_each_picture(page: Page) -> None:
    page.locator("#draw").click()
    pieces = page.locator("figure:not(.preview) .bar div")
    expect(pieces).to_have_count(5)
    titles = pieces.evaluate_all("all => all.map(piece => piece.title)")
    assert [title.split()[0] for title in titles] == ["queue", "text", "denoise", "decode", "image"]
    widths = pieces.evaluate_all("all => all.map(piece => parseFloat(piece.style.width))")
    assert sum(widths) == pytest.approx(100, abs=1)


def test_a_refusal_says_what_is_wrong_and_the_button_comes_back(page: Page) -> None:
    page.locator("#size").fill("63x64")
    page.locator("#draw").click()
    expect(page.locator("#message.error")).to_contain_text("size is 63x64")
    expect(page.locator("#draw")).to_be_enabled()


def test_what_takes_too_long_is_stopped(page: Page, gate: Gate) -> None:
    page.locator("#count").fill("10")
    with gate.closed():
        page.locator("#draw").click()
        expect(page.locator("#stop")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#message")).to_have_text("Stopped.")
    expect(page.locator("figure.preview")).to_have_count(0)
    expect(page.locator("#draw")).to_be_enabled()


def test_where_a_key_is_needed_the_page_asks_for_it(
    lcm_checkpoint: Path, cache_dir: Path, tmp_path: Path
) -> None:
    key, line = make_key("newcomer")
    (tmp_path / "keys").write_text(line)
    values = {"model": str(lcm_checkpoint), "cache_dir": cache_dir}
    with serving(**values, api_keys_file=tmp_path / "keys") as url, studio(url) as page:
        expect(page.locator("#message.error")).to_contain_text("no API key was given")
        page.locator("#key").fill(key)
        page.locator("#key").press("Enter")
        expect(page.locator("#model")).to_contain_text("onnxruntime")
        page.locator("#draw").click()
        expect(page.locator("figure:not(.preview) img")).to_have_count(1)
        expect(page.locator("#message")).to_contain_text("ms in all")
