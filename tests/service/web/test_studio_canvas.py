"""The studio's canvas and its pictures: what is drawn on it, by which hand, what is kept."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from engines.distill.captions import WORDS
from tests.engines.checkpoints import make_lora, make_tiny_vae
from tests.service.web.test_api import png
from tests.service.web.test_studio import NEEDS_CHROMIUM, serving, studio
from tests.waiting import wait_for

pytestmark = NEEDS_CHROMIUM
STATIC = Path("service/web/static")
RED = (215, 35, 40)  # the brush's first colour


@pytest.fixture(scope="module")
def url(lcm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("beside")
    lora = make_lora(lcm_checkpoint, folder / "ink", ["to_q", "to_v"])
    tiny_vae = str(make_tiny_vae(folder / "tiny-vae"))
    values = {"model": str(lcm_checkpoint), "loras": {"ink": lora}, "tiny_vae": tiny_vae}
    with serving(engine="torch", **values) as url:
        yield url


@pytest.fixture
def page(url: str) -> Iterator[Page]:
    with studio(url) as page:
        expect(page.locator("#model")).to_contain_text("torch")
        yield page


def open_canvas(page: Page) -> None:
    page.get_by_role("radio", name="Canvas").check()
    expect(page.locator("#paper")).to_be_visible()


def point(page: Page, x: float, y: float) -> tuple[float, float]:
    """Where a place of the canvas, in shares of it, is on the page."""
    page.locator("#paper").scroll_into_view_if_needed()
    box = page.locator("#paper").bounding_box()
    assert box is not None
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def stroke(page: Page, *places: tuple[float, float]) -> None:
    page.mouse.move(*point(page, *places[0]))
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*point(page, *place), steps=4)
    page.mouse.up()


def pixels(data_url: str, mode: str = "RGB") -> np.ndarray:
    """uint8 ``[H, W, 3]`` (RGBA: 4) of a ``data:`` URL, read by Pillow."""
    data = base64.b64decode(data_url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


def canvas(page: Page) -> np.ndarray:
    return pixels(page.evaluate("document.querySelector('#paper').toDataURL()"))


def is_red(shown: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(shown.astype(int) - RED).sum(-1) < 30)


def drawn(page: Page) -> dict[str, Any]:
    """Press the button; the request that was sent, once its pictures are there."""
    with page.expect_request(lambda request: "/v1/images/" in request.url) as sent:
        page.locator("#draw").click()
    expect(page.locator("#message")).to_contain_text("ms in all")
    body: dict[str, Any] = sent.value.post_data_json
    return body | {"path": sent.value.url}


def finished(page: Page) -> bytes:
    """The newest picture's file."""
    source = page.locator("figure:not(.preview) img").first.get_attribute("src") or ""
    return base64.b64decode(source.partition(",")[2])


def drop(page: Page, name: str, data: bytes) -> None:
    encoded = base64.b64encode(data).decode()
    page.evaluate(
        """([name, encoded]) => {
            const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name, { type: "image/png" }));
            const options = { dataTransfer, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent("drop", options));
        }""",
        [name, encoded],
    )


def test_what_is_drawn_is_what_an_edit_starts_from(page: Page, url: str) -> None:
    open_canvas(page)
    stroke(page, (0.25, 0.5), (0.75, 0.5))
    page.locator("#seed").fill("7")
    sent = drawn(page)
    image = pixels(sent["image"])
    assert image.shape == (64, 64, 3)
    assert tuple(image[4, 4]) == (255, 255, 255)
    assert is_red(image)[32, 18:46].all()
    assert sent.pop("path") == f"{url}/v1/images/edits"
    answer = httpx.post(
        f"{url}/v1/images/edits", json=sent | {"stream": False, "partial_images": 0}, timeout=60
    )
    assert finished(page) == base64.b64decode(answer.json()["data"][0]["b64_json"])


def test_a_canvas_that_nobody_touched_says_nothing(page: Page, url: str) -> None:
    open_canvas(page)
    assert drawn(page)["path"] == f"{url}/v1/images/generations"


def test_what_the_mask_leaves_out_comes_back_as_it_was(page: Page) -> None:
    open_canvas(page)
    stroke(page, (0.1, 0.1), (0.9, 0.1))
    page.get_by_role("radio", name="Mask").check()
    expect(page.locator("output[for=strength]")).to_have_text("1.00")
    page.locator("#width").fill("40")
    stroke(page, (0.5, 0.7), (0.6, 0.7))
    sent = drawn(page)
    kept = pixels(sent["mask"]["image_url"], "RGBA")[..., 3] == 255
    assert not kept[45, 35]
    assert kept[5, 5]
    result, start = np.asarray(Image.open(io.BytesIO(finished(page)))), pixels(sent["image"])
    assert np.array_equal(result[kept], start[kept])
    assert not np.array_equal(result, start)


def test_undo_redo_eraser_fill_and_clear(page: Page) -> None:
    open_canvas(page)
    blank = canvas(page)
    stroke(page, (0.25, 0.5), (0.75, 0.5))
    one = canvas(page)
    assert is_red(one).any()
    page.get_by_role("radio", name="Eraser").check()
    stroke(page, (0.5, 0.2), (0.5, 0.8))
    assert not is_red(canvas(page))[one.shape[0] // 2, one.shape[1] // 2]
    page.locator("#undo").click()
    assert np.array_equal(canvas(page), one)
    page.keyboard.press("Control+z")
    assert np.array_equal(canvas(page), blank)
    expect(page.locator("#invite")).not_to_have_class("gone")
    expect(page.locator("#undo")).to_be_disabled()
    page.locator("#redo").click()
    assert np.array_equal(canvas(page), one)
    page.locator("#fill").click()
    assert is_red(canvas(page)).all()
    page.locator("#clear").click()
    assert np.array_equal(canvas(page), blank)


def test_a_pen_that_is_pressed_harder_draws_wider(page: Page) -> None:
    open_canvas(page)
    input_of = page.context.new_cdp_session(page)

    def press(y: float, force: float) -> None:
        for kind, place in (
            ("mousePressed", (0.2, y)),
            ("mouseMoved", (0.8, y)),
            ("mouseReleased", (0.8, y)),
        ):
            at_x, at_y = point(page, *place)
            values = {"type": kind, "x": at_x, "y": at_y, "force": force, "pointerType": "pen"}
            input_of.send("Input.dispatchMouseEvent", values | {"button": "left", "buttons": 1})

    press(0.25, 0.1)
    press(0.75, 1.0)
    red = is_red(canvas(page))
    middle = red.shape[0] // 2
    soft, hard = red[:middle].sum(), red[middle:].sum()
    assert 0 < 2 * soft < hard


def test_a_finger_draws_on_a_phone(url: str) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with studio(url, **phone) as page:
        open_canvas(page)
        fingers = page.context.new_cdp_session(page)
        (x, y), (to_x, to_y) = point(page, 0.2, 0.5), point(page, 0.8, 0.5)
        scrolled = page.evaluate("scrollY")
        for kind, points in (
            ("touchStart", [{"x": x, "y": y}]),
            ("touchMove", [{"x": to_x, "y": to_y}]),
            ("touchEnd", []),
        ):
            fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        assert is_red(canvas(page)).any()
        assert page.evaluate("scrollY") == scrolled
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out"


def test_several_pictures_are_kept_with_what_made_them(page: Page) -> None:
    page.locator("#prompt").fill("a red cube")
    page.locator("#count").fill("2")
    page.locator("#seed").fill("5")
    page.locator("#steps").fill("3")
    page.locator("#lora-ink").fill("0.5")
    sent = drawn(page)
    assert sent["loras"] == [{"name": "ink", "weight": 0.5}]
    kept = page.locator("#kept li")
    expect(kept).to_have_count(2)
    page.reload()
    expect(kept).to_have_count(2)
    expect(page.locator("#sampler")).not_to_be_empty()
    page.locator("#prompt").fill("something else")
    kept.locator("button[title*='seed 6']").click()
    expect(page.locator("#message")).to_contain_text("settings are back")
    again = drawn(page)
    assert {**again, "n": 2, "seed": 5} == sent
    assert again["seed"] == 6
    page.locator("#forget").click()
    expect(page.locator("#history")).to_be_hidden()
    page.reload()
    expect(page.locator("#model")).to_contain_text("torch")
    expect(kept).to_have_count(0)


@pytest.mark.parametrize(
    "prompt", ["a red cube, Steps: many", "ein roter Würfel", "赤い立方体\n二行"]
)
def test_a_dropped_png_brings_its_settings_back(page: Page, url: str, prompt: str) -> None:
    asked = {
        "prompt": prompt, "negative_prompt": "grey", "seed": 12345, "num_inference_steps": 5,
        "guidance_scale": 3.5, "sampler": "ddim", "size": "64x96", "decoder": "tiny",
        "loras": [{"name": "ink", "weight": 0.75}],
    }  # fmt: skip
    headers = {"accept": "image/png"}
    made = httpx.post(f"{url}/v1/images/generations", json=asked, headers=headers, timeout=60)
    expect(page.locator("#prompt")).not_to_be_empty()
    drop(page, "drawn.png", made.content)
    expect(page.locator("#message")).to_have_text("Its settings are back.")
    sent = drawn(page)
    assert {name: sent[name] for name in asked} == asked
    assert finished(page) == made.content


def test_a_dropped_photo_becomes_the_canvas(page: Page) -> None:
    expect(page.locator("#prompt")).not_to_be_empty()
    photo = png(64, 64)
    drop(page, "photo.png", photo)
    expect(page.locator("#paper")).to_be_visible()
    wait_for(lambda: bool(canvas(page).std() > 40), "the photo is on the canvas")
    sent = pixels(drawn(page)["image"])
    original = np.asarray(Image.open(io.BytesIO(photo)))
    assert np.array_equal(sent, original)
    drop(page, "broken.png", b"\x89PNG\r\n\x1a\n and no more")
    expect(page.locator("#message.error")).to_have_text(re.compile("broken.png cannot be read"))


def test_a_picture_is_drawn_on(page: Page) -> None:
    drawn(page)
    page.locator("figure").get_by_role("button", name="Draw on it").click()
    expect(page.locator("#paper")).to_be_focused()
    wait_for(lambda: bool((canvas(page) < 250).any()), "the picture is on the canvas")
    result = np.asarray(Image.open(io.BytesIO(finished(page))))
    assert np.array_equal(pixels(drawn(page)["image"]), result)


def test_a_download_is_the_file_that_was_drawn(page: Page) -> None:
    drawn(page)
    with page.expect_download() as download:
        page.locator("figure").get_by_role("button", name="Save").click()
    assert Path(download.value.path()).read_bytes() == finished(page)
    assert re.fullmatch(r"fourstep-\d+\.png", download.value.suggested_filename)


def test_examples_for_the_demo_use_the_words_it_knows() -> None:
    source = (STATIC / "examples.js").read_text()
    prompts = re.findall(r'^    "(a .*)",$', source.partition("const ANY")[0], re.MULTILINE)
    assert len(prompts) >= 4
    assert {word for prompt in prompts for word in re.findall(r"\w+", prompt)} <= set(WORDS)
    (world,) = re.findall(r"const WORLD = \{(.*?)\};", source, re.DOTALL)
    assert set(re.findall(r'"(\w+)"', world)) <= set(WORDS)


def test_no_script_names_another_host() -> None:
    for file in STATIC.iterdir():
        found = set(re.findall(r"https?://[\w.]+", file.read_text()))
        assert found <= {"http://www.w3.org"}, file.name  # the icon's namespace
