"""Pictures of the studio for README: ``python -m tests.service.web.screens``, with Chromium."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect

from tests.service.web.test_studio import serving, studio
from tests.service.web.test_studio_canvas import point
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


def draw_slowly(page: Page, *places: tuple[float, float]) -> None:
    """As a hand would: pictures come all the while."""
    page.mouse.move(*point(page, *places[0]))
    page.mouse.down()
    for (x, y), (to_x, to_y) in itertools.pairwise(places):
        for share in np.linspace(0, 1, 12):
            page.mouse.move(*point(page, x + share * (to_x - x), y + share * (to_y - y)))
            page.wait_for_timeout(30)
    page.mouse.up()


def draw_live(page: Page) -> None:
    page.locator("#prompts button").nth(1).click()
    page.get_by_role("radio", name="Live").check()
    expect(page.locator("#screen")).to_have_attribute("data-frames", re.compile(r"\d"))
    page.locator("#swatches [title='#6ec369']").click()
    page.locator("#fill").click()
    page.locator("#swatches [title='#d72328']").click()
    page.locator("#width").fill("34")
    page.locator("#prompt-b").fill("a large purple heart at the center on a yellow background")
    settled(page)
    draw_slowly(page, *HOUSE)
    page.wait_for_timeout(500)


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
