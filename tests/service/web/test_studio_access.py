"""The studio for everybody: by keyboard alone, and as axe-core judges it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.service.web.gate import Gate
from tests.service.web.test_clients import install
from tests.service.web.test_studio import NEEDS_CHROMIUM, serving, studio
from tests.service.web.test_studio_live import settled

pytestmark = NEEDS_CHROMIUM
AXE = "axe-core@4.14.1"
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def url(lcm_checkpoint: Path, cache_dir: Path, gate: Gate) -> Iterator[str]:
    with serving(model=str(lcm_checkpoint), cache_dir=cache_dir) as url:
        yield url


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checker's source."""
    if not shutil.which("npm"):
        pytest.skip("no npm: apt-get install npm")
    folder = tmp_path_factory.mktemp("axe")
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error"]
    install(["npm", "install", *options, AXE], folder)
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


def violations(page: Page, axe: str) -> list[str]:
    """Of any impact; the policy lets no page load the checker, the debugger does."""
    page.wait_for_timeout(400)  # what fades in has its colours then
    page.evaluate(axe)
    found: dict[str, Any] = page.evaluate("axe.run()")
    assert len(found["passes"]) > 10
    return [
        f"{each['impact']} {each['id']}: {node['html'][:120]} {node['failureSummary']}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing(url: str, axe: str, viewport: dict[str, int], scheme: str) -> None:
    with studio(url, viewport=viewport, color_scheme=scheme) as page:
        expect(page.locator("#model")).to_contain_text("onnxruntime")
        assert violations(page, axe) == []
        page.locator("#settings").evaluate("details => { details.open = true; }")
        page.locator("#size").fill("63x64")
        page.locator("#draw").click()
        expect(page.locator("#message.error")).to_be_visible()
        assert violations(page, axe) == []
        page.locator("#size").fill("")
        page.locator("#draw").click()
        expect(page.locator("#kept li")).to_have_count(1)
        page.get_by_role("radio", name="Live").check()
        expect(page.locator("#screen")).to_have_attribute("data-frames", re.compile(r"\d"))
        assert violations(page, axe) == []
        for name in ("help", "key"):
            page.locator(f"#open-{name}").click()
            assert violations(page, axe) == []
            page.keyboard.press("Escape")


def test_axe_would_find_something(url: str, axe: str) -> None:
    with studio(url) as page:
        expect(page.locator("#model")).to_contain_text("onnxruntime")
        page.evaluate("document.querySelector('#prompt').closest('.ask').children[0].remove()")
        assert any("label" in each for each in violations(page, axe))


def test_the_theme_is_chosen_and_kept(url: str) -> None:
    with studio(url, color_scheme="light") as page:

        def paper() -> str:
            return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

        light = paper()
        expect(page.locator("#theme")).to_have_text("Theme: auto")
        for theme in ("light", "dark"):
            page.locator("#theme").click()
            expect(page.locator("#theme")).to_have_text(f"Theme: {theme}")
            assert (paper() == light) == (theme == "light")
        page.reload()
        expect(page.locator("#theme")).to_have_text("Theme: dark")
        assert paper() != light


@pytest.mark.parametrize("wish", ["no-preference", "reduce"])
def test_nothing_moves_where_that_is_not_wished(url: str, wish: str, gate: Gate) -> None:
    with studio(url, reduced_motion=wish) as page, gate.closed():
        expect(page.locator("#model")).to_contain_text("onnxruntime")
        page.locator("#draw").click()
        expect(page.locator("#stop")).to_be_visible()
        moving = page.evaluate("document.getAnimations().length")
        assert (moving == 0) == (wish == "reduce")
        page.keyboard.press("Escape")
        expect(page.locator("#message")).to_have_text("Stopped.")


def tab_to(page: Page, selector: str) -> None:
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab never comes to {selector}")


def test_all_is_done_by_keyboard(url: str) -> None:
    with studio(url) as page:
        expect(page.locator("#model")).to_contain_text("onnxruntime")
        keys = page.keyboard
        tab_to(page, "#prompt")
        keys.press("Control+a")
        keys.type("a red cube")
        keys.press("Enter")
        expect(page.locator("#message")).to_contain_text("ms in all")
        expect(page.get_by_role("img", name="a red cube")).to_have_count(2)  # and in the history

        tab_to(page, "figure button")
        keys.press("Enter")  # draw on it
        expect(page.locator("#paper")).to_be_focused()
        page.reload()

        expect(page.locator("#model")).to_contain_text("onnxruntime")
        tab_to(page, "#mode input")
        keys.press("ArrowRight")
        expect(page.locator("#screen")).to_have_attribute("data-frames", re.compile(r"\d"))
        before = settled(page)
        tab_to(page, "#paper")
        expect(page.locator("#pen")).to_be_visible()
        keys.press("m")
        expect(page.get_by_role("radio", name="Mask")).to_be_checked()
        keys.press("b")
        keys.press("Space")
        expect(page.locator("#pen-says")).to_contain_text("pen down, 50 % from the left")
        for key in ("Shift+ArrowRight", "Shift+ArrowDown", "ArrowLeft"):
            keys.press(key)
        expect(page.locator("#pen-says")).to_contain_text("pen down, 57 % from the left")
        keys.press("Space")
        assert settled(page) != before
        keys.press("Control+z")
        assert settled(page) == before
