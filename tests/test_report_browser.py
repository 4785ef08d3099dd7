"""The report in a browser: it asks for nothing, runs nothing, fits on a phone, and is lit as the reader's screen is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from blackbox_kd import report
from tests.reported import NASTY, whole

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1200, "height": 900}
LEAST_CONTRAST = 4.5
"""WCAG 2.2, 1.4.3 (AA): of text to what is behind it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    assert program, f"none of {', '.join(NAMES)} is installed; `make browser` installs one"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(whole(tmp_path_factory.mktemp("browser") / "run").folder)


@contextmanager
def opened(browser: Browser, path: Path, size: Any = DESK, **screen: Any) -> Iterator[tuple[Page, list[str]]]:
    """The page with all of it unfolded, and what it asked for or said on the console."""
    page = browser.new_page(viewport=size, **screen)
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    yield page, seen
    page.close()


def test_it_asks_for_itself_alone_and_says_nothing(browser: Browser, path: Path) -> None:
    with opened(browser, path) as (_, seen):
        assert seen == [path.as_uri()]
    assert path.stat().st_size < report.MOST_BYTES


def test_markup_in_texts_prompts_and_config_is_text(browser: Browser, path: Path) -> None:
    with opened(browser, path) as (page, _):
        assert "owned" not in page.title()
        assert page.locator("script, img").count() == 0
        assert page.locator(".prompt", has_text=NASTY).count() >= 1
        assert page.locator(".text", has_text=NASTY).count() >= 4
        assert "<script>document.title" in page.locator("#config pre").inner_text()


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_is_wider_than_the_screen(browser: Browser, path: Path, size: Any) -> None:
    with opened(browser, path, size) as (page, _):
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
        assert page.locator("svg").first.bounding_box()["width"] <= size["width"]  # type: ignore[index]


def test_the_dark_is_another_picture_of_the_same_text(browser: Browser, path: Path) -> None:
    shown = {}
    for scheme in ("light", "dark"):
        with opened(browser, path, color_scheme=scheme) as (page, _):
            shown[scheme] = page.inner_text("body"), page.screenshot()
    assert shown["light"][0] == shown["dark"][0]
    assert shown["light"][1] != shown["dark"][1]


COLOURS = """() => [...document.querySelectorAll('body *')].filter(
    e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.checkVisibility()
).map(e => {
    const svg = e.closest('svg') !== null
    let behind = e
    const clear = "rgba(0, 0, 0, 0)"
    while (getComputedStyle(behind).backgroundColor === clear && behind.parentElement) behind = behind.parentElement
    const style = getComputedStyle(e)
    return [style[svg ? 'fill' : 'color'], getComputedStyle(behind).backgroundColor, e.textContent.trim()]
})"""
"""Colour of each element with text of its own, and that behind it."""


def luminance(colour: str) -> float:
    """Relative, of `rgb(r, g, b)` (WCAG 2.2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_told_from_what_is_behind_it(browser: Browser, path: Path, scheme: Any) -> None:
    with opened(browser, path, color_scheme=scheme) as (page, _):
        found = page.evaluate(COLOURS)
    assert len(found) > 200
    for text, behind, words in found:
        lighter, darker = sorted((luminance(text), luminance(behind)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= LEAST_CONTRAST, (words, text, behind)


def test_tables_have_headers_and_scroll_by_key(browser: Browser, path: Path) -> None:
    with opened(browser, path, PHONE) as (page, _):
        assert page.locator("th:not([scope])").count() == 0
        assert page.locator("table").count() == page.locator(".scroll[tabindex='0'][aria-label] table").count()
        assert page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(e => e.tagName)")[0] == "H1"
        assert page.locator("svg:not([aria-label])").count() == 0
