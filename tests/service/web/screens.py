"""Pictures of the studio for README: ``python -m tests.service.web.screens``, with Chromium."""

from __future__ import annotations

import io
import re
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from tests.service.web.test_studio import serving, studio
from tests.service.web.test_studio_canvas import stroke
from tests.service.web.test_studio_live import settled

FOLDER = Path("service/web/screens")
MAX_BYTES = 200_000
SEED = "5"
HOUSE = ((0.3, 0.72), (0.3, 0.5), (0.45, 0.32), (0.6, 0.5), (0.6, 0.72), (0.45, 0.72), (0.45, 0.5))


def save(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.wait_for_timeout(500)  # what fades in is there then
    file = FOLDER / f"{name}.webp"
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(file, lossless=True)
    assert file.stat().st_size < MAX_BYTES, file


def draw_examples(page: Page) -> None:
    expect(page.locator("#model")).to_contain_text("demo-lcm")
    for index in range(1, 6):
        page.locator("#seed").evaluate(f"seed => {{ seed.value = {SEED}; }}")
        page.locator("#lock").evaluate("box => { box.checked = true; }")
        page.locator("#prompts button").nth(index).click()
        expect(page.locator("#kept li")).to_have_count(index)


def draw_live(page: Page) -> None:
    page.locator("#prompts button").nth(1).click()
    page.get_by_role("radio", name="Live").check()
    expect(page.locator("#screen")).to_have_attribute("data-frames", re.compile(r"\d"))
    page.locator("#swatches [title='#6ec369']").click()
    page.locator("#fill").click()
    page.locator("#swatches [title='#d72328']").click()
    page.locator("#width").fill("34")
    stroke(page, *HOUSE)
    page.locator("#prompt-b").fill("a large purple heart at the center on a yellow background")
    settled(page)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with serving(model="demo-lcm") as url:
        with studio(url, viewport={"width": 1440, "height": 1040}, color_scheme="light") as page:
            draw_examples(page)
            draw_live(page)
            save(page, "wide")
        phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
        with studio(url, **phone, color_scheme="dark") as page:
            draw_examples(page)
            save(page, "phone")


if __name__ == "__main__":
    main()
