"""The studio with a model of clips: they are drawn as jobs, played over and over, and saved."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.service.web.test_studio import NEEDS_CHROMIUM, serving, studio
from tests.service.web.test_studio_access import PHONE, axe, tab_to, violations
from tests.waiting import wait_for

__all__ = ["axe"]  # a fixture
pytestmark = NEEDS_CHROMIUM
PROMPT = "a red cube"


@pytest.fixture(scope="module")
def url(
    clip_checkpoint: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    values = {
        "engine": "torch",
        "max_steps": 1000,
        "request_timeout_s": 3600,  # a busy machine would call a long one hopeless
        "video_timeout_s": 3600,
        "video_files_dir": tmp_path_factory.mktemp("videos"),
    }
    with serving(model=str(clip_checkpoint), cache_dir=cache_dir, **values) as url:
        yield url


def saved(page: Page, name: str) -> bytes:
    with page.expect_download() as download:
        page.get_by_role("button", name=name).click()
    assert download.value.suggested_filename == f"fourstep-7.{name.split()[-1].lower()}"
    return download.value.path().read_bytes()


def clip_of_the_api(url: str, media_type: str) -> bytes:
    request = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 2, "num_frames": 6}
    headers = {"Accept": media_type}
    answer = httpx.post(f"{url}/v1/videos", json=request, headers=headers, timeout=60)
    assert answer.headers["content-type"] == media_type
    return answer.content


def test_a_clip_is_drawn_played_and_saved(url: str) -> None:
    """By keyboard alone; what is saved is what the API gives."""
    with studio(url) as page:
        expect(page.get_by_role("radio", name="Clips")).to_be_checked()
        expect(page.locator("#frames")).to_have_value("8")
        for name, value in {"steps": "2", "frames": "6", "seed": "7"}.items():
            page.locator(f"#{name}").fill(value)
        tab_to(page, "#prompt")
        page.keyboard.press("Control+a")
        page.keyboard.type(PROMPT)
        page.keyboard.press("Enter")
        expect(page.locator("#message")).to_contain_text("ms in all")
        expect(page.locator("figcaption")).to_contain_text("seed 7, 64x64, 6 frames")
        expect(page.locator("figure .bar div")).to_have_count(5)
        clip = page.locator(f"figure video[aria-label='{PROMPT}']")
        wait_for(lambda: clip.evaluate("v => v.currentTime") > 0, "it is played")
        assert clip.evaluate("v => [v.videoWidth, v.loop, v.controls]") == [64, True, True]
        assert clip.evaluate("v => v.duration") == pytest.approx(6 / 8, abs=0.05)
        assert saved(page, "Save MP4") == clip_of_the_api(url, "video/mp4")
        animated = saved(page, "Save WebP")
        assert animated == clip_of_the_api(url, "image/webp")
        with Image.open(io.BytesIO(animated)) as image:
            assert image.is_animated  # type: ignore[attr-defined]
        assert httpx.get(f"{url}/v1/videos").json()["data"] == []  # none is left behind


def test_one_that_takes_too_long_is_stopped_and_gone(url: str, axe: str) -> None:
    with studio(url, viewport=PHONE, color_scheme="dark", reduced_motion="reduce") as page:
        expect(page.get_by_role("radio", name="Clips")).to_be_checked()
        page.locator("#settings").evaluate("details => { details.open = true; }")
        page.locator("#sampler").select_option("ddim")
        page.locator("#steps").evaluate("steps => { steps.max = 1000; steps.value = 900; }")
        page.locator("#draw").click()
        bar = page.get_by_role("progressbar")
        expect(bar).to_be_visible()
        assert violations(page, axe) == []
        expect(bar).not_to_have_attribute("value", "0")
        (job,) = httpx.get(f"{url}/v1/videos").json()["data"]
        assert job["status"] == "in_progress"
        page.locator("#stop").click()
        expect(page.locator("#message")).to_have_text("Stopped.")
        expect(page.locator("figure")).to_have_count(0)
        page.locator("#steps").fill("1")
        page.locator("#draw").click()
        expect(page.locator("figure video")).to_have_count(1)
        assert page.locator("figure video").evaluate("v => v.paused")  # as the person wishes
        assert violations(page, axe) == []
        assert httpx.get(f"{url}/v1/videos").json()["data"] == []


def test_a_browser_without_h264_shows_a_webp(url: str) -> None:
    with studio(url) as page:
        expect(page.get_by_role("radio", name="Clips")).to_be_checked()
        page.evaluate("HTMLMediaElement.prototype.canPlayType = () => ''")
        page.locator("#steps").fill("1")
        page.locator("#draw").click()
        expect(page.locator("figure:not(.preview) img")).to_have_js_property("naturalWidth", 64)


def test_pictures_can_be_asked_for_too(url: str) -> None:
    with studio(url) as page:
        expect(page.get_by_role("radio", name="Clips")).to_be_checked()  # Pictures was, before
        page.get_by_role("radio", name="Pictures").check()
        page.locator("#steps").fill("1")
        page.locator("#draw").click()
        expect(page.locator("figure:not(.preview) img")).to_have_count(1)
        expect(page.locator("#start")).to_be_hidden()
