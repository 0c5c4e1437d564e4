"""Every link of a README leads to a file of this tree, and to a heading that is there."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for folder in (".", "service", "engines", "loadtests", "deploy", "tests")
    for page in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)


def _anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings: lower case, no punctuation, hyphens for spaces."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    headings = [
        following.content
        for token, following in itertools.pairwise(tokens)
        if token.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def _links(page: Path) -> list[str]:
    rendered = MarkdownIt("commonmark").render(page.read_text())
    found = re.findall(r"(?:href|src)=\"([^\"]+)\"", rendered)
    return [link for link in found if not re.match(r"https?:|data:|#$", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in _links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), link
