"""Live drawing in the studio: a stroke changes the picture, a lost connection comes back."""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from service.access.keys import make_key
from service.ray_serve.environment import free_port
from tests.service.web.test_studio import NEEDS_CHROMIUM, serving, studio
from tests.service.web.test_studio_canvas import stroke
from tests.waiting import wait_for

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def values(lcm_checkpoint: Path, cache_dir: Path) -> dict[str, Any]:
    return {"model": str(lcm_checkpoint), "cache_dir": cache_dir}


@pytest.fixture(scope="module")
def url(values: dict[str, Any]) -> Iterator[str]:
    with serving(**values) as url:
        yield url


class Wire:
    """What goes to the service and what comes back, as the browser saw it."""

    def __init__(self, page: Page) -> None:
        self.sent: list[dict[str, Any]] = []
        self.heard: list[dict[str, Any]] = []

        def follow(socket: Any) -> None:
            socket.on("framesent", lambda text: self.sent.append(json.loads(text)))
            socket.on("framereceived", lambda text: self.heard.append(json.loads(text)))

        page.on("websocket", follow)

    def last(self, kind: str) -> dict[str, Any]:
        return [each for each in self.heard if each["type"] == kind][-1]


@contextlib.contextmanager
def live(url: str, **options: Any) -> Iterator[Page]:
    """The page in live mode, its first picture drawn."""
    with studio(url, **options) as page:
        expect(page.locator("#model")).to_contain_text("onnxruntime")
        page.get_by_role("radio", name="Live").check()
        expect(page.locator("#screen")).to_have_attribute("data-frames", re.compile(r"\d"))
        yield page


def settled(page: Page) -> str:
    """The picture of what is drawn: none is still to come."""
    expect(page.locator("#screen")).to_have_attribute("data-busy", "false")
    return str(page.evaluate("document.querySelector('#screen').toDataURL()"))


def test_a_stroke_changes_the_picture_and_undo_changes_it_back(url: str) -> None:
    with live(url) as page:
        before = settled(page)
        stroke(page, (0.2, 0.5), (0.8, 0.5))
        after = settled(page)
        assert after != before
        assert float(page.locator("#fps").inner_text()) > 0
        assert int(page.locator("#latency").inner_text()) > 0
        page.locator("#undo").click()
        assert settled(page) == before


def test_each_picture_is_what_an_edit_of_the_canvas_gives(url: str) -> None:
    with studio(url) as page:
        wire = Wire(page)
        expect(page.locator("#model")).to_contain_text("onnxruntime")
        page.get_by_role("radio", name="Live").check()
        expect(page.locator("#screen")).to_have_attribute("data-frames", re.compile(r"\d"))
        stroke(page, (0.2, 0.5), (0.8, 0.5))
        settled(page)
    held = [each for each in wire.sent if each["type"] == "session.update"][-1]
    frame = wire.sent[-1]
    assert (frame["type"], frame["id"]) == ("frame", wire.last("frame")["id"])
    fields = {name: each for name, each in held.items() if name not in ("type", "prompt_b")}
    request = fields | {"image": frame["image"], "output_format": "jpeg"}
    answer = httpx.post(f"{url}/v1/images/edits", json=request, timeout=60).json()
    assert wire.last("frame")["image"] == answer["data"][0]["b64_json"]


def test_it_goes_from_prompt_to_prompt(url: str) -> None:
    with live(url) as page:
        page.get_by_role("radio", name="Words").check()
        page.locator("#prompt").fill("a red cube")
        at_a = settled(page)
        page.locator("#prompt-b").fill("a blue sphere")
        assert settled(page) == at_a
        page.locator("#share").press("End")
        at_b = settled(page)
        page.locator("#share").fill("0.5")
        between = settled(page)
        assert len({at_a, between, at_b}) == 3
        page.locator("#prompt").fill("a blue sphere")
        page.locator("#share").press("Home")
        assert settled(page) == at_b, "prompt B alone"


def test_a_service_that_restarts_goes_on_with_the_same_picture(values: dict[str, Any]) -> None:
    port = free_port()
    with contextlib.ExitStack() as browser:
        with serving(at_port=port, **values) as url:
            page = browser.enter_context(live(url))
            stroke(page, (0.2, 0.5), (0.8, 0.5))
            before = settled(page)
        expect(page.locator("#connection")).not_to_have_text("connected")
        drawn = page.locator("#screen").get_attribute("data-frames")
        with serving(at_port=port, **values):
            expect(page.locator("#connection")).to_have_text("connected")
            expect(page.locator("#screen")).not_to_have_attribute("data-frames", str(drawn))
            assert settled(page) == before
            stroke(page, (0.5, 0.2), (0.5, 0.8))
            assert settled(page) != before
            browser.close()


def test_a_refusal_is_told_and_goes_when_the_value_is_good_again(url: str) -> None:
    with live(url) as page:
        page.locator("#size").fill("63x64")
        page.locator("#size").press("Enter")
        expect(page.locator("#message.error")).to_contain_text("size is 63x64")
        page.locator("#size").fill("64x96")
        page.locator("#size").press("Enter")
        expect(page.locator("#message.error")).to_have_count(0)
        wait_for(lambda: page.locator("#screen").evaluate("s => s.height") == 96, "it is drawn")


def test_the_webcam_is_drawn_from_until_it_is_stopped(url: str) -> None:
    with live(url) as page:
        page.locator("#webcam").click()
        expect(page.locator("#webcam")).to_have_attribute("aria-pressed", "true")
        count = page.locator("#screen").get_attribute("data-frames")
        for _ in range(3):
            expect(page.locator("#screen")).not_to_have_attribute("data-frames", str(count))
            count = page.locator("#screen").get_attribute("data-frames")
        page.locator("#webcam").click()
        settled(page)


def test_a_recording_is_a_video(url: str) -> None:
    with live(url) as page:
        page.locator("#record").click()
        stroke(page, (0.2, 0.5), (0.8, 0.5))
        settled(page)
        with page.expect_download() as download:
            page.locator("#record").click()
        data = Path(download.value.path()).read_bytes()
        assert data.startswith(b"\x1aE\xdf\xa3"), "EBML, as WebM begins"


def test_what_is_saved_is_what_is_seen(url: str) -> None:
    with live(url) as page:
        stroke(page, (0.2, 0.5), (0.8, 0.5))
        seen = settled(page)
        with page.expect_download() as download:
            page.locator("#save").click()
        data = Path(download.value.path()).read_bytes()
        assert data == base64.b64decode(seen.partition(",")[2])
        expect(page.locator("#kept li")).to_have_count(1)


def test_a_key_opens_a_session_and_is_kept_only_if_asked(
    values: dict[str, Any], tmp_path: Path
) -> None:
    key, line = make_key("newcomer")
    (tmp_path / "keys").write_text(line)
    with serving(**values, api_keys_file=tmp_path / "keys") as url, studio(url) as page:

        def enter() -> None:
            page.locator("#key").fill(key)
            page.locator("#key").press("Enter")
            expect(page.locator("#model")).to_contain_text("onnxruntime")

        enter()
        page.get_by_role("radio", name="Live").check()
        expect(page.locator("#screen")).to_have_attribute("data-frames", re.compile(r"\d"))
        page.reload()
        expect(page.locator("#key-dialog")).to_be_visible()
        expect(page.locator("#key")).to_have_value("")
        page.locator("#remember").check()
        enter()
        page.reload()
        expect(page.locator("#model")).to_contain_text("onnxruntime")
        page.locator("#open-key").click()
        page.locator("#remember").uncheck()
        enter()
        stored = "Object.values(localStorage).join()"
        wait_for(lambda: key not in page.evaluate(stored), "the browser has forgotten the key")


def test_one_that_rests_goes_on_at_the_next_stroke(values: dict[str, Any]) -> None:
    with serving(**values, live_idle_s=3) as url, live(url) as page:
        expect(page.locator("#connection")).to_contain_text("resting")
        before = settled(page)
        drawn = str(page.locator("#screen").get_attribute("data-frames"))
        stroke(page, (0.2, 0.5), (0.8, 0.5))
        expect(page.locator("#screen")).not_to_have_attribute("data-frames", drawn)
        assert settled(page) != before


def test_where_there_is_no_room_it_waits_for_some(values: dict[str, Any]) -> None:
    with serving(**values, max_live_sessions=1) as url, live(url) as page:
        browser = page.context.browser
        assert browser is not None
        other = browser.new_page()
        other.goto(url)
        expect(other.locator("#model")).to_contain_text("onnxruntime")
        other.get_by_role("radio", name="Live").check()
        expect(other.locator("#connection")).to_contain_text("1 live sessions are open")
        page.get_by_role("radio", name="Pictures").check()
        expect(other.locator("#connection")).to_have_text("connected")
