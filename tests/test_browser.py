"""The browser the page tests use is real: it runs scripts, follows links, and does not reach the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from browser import NewPage
    from playwright.sync_api import Page


def test_a_click_and_dark_colours(new_page: NewPage, tmp_path: Path) -> None:
    (tmp_path / "b.html").write_text("<!doctype html><title>there</title><p id=t></p>")
    (tmp_path / "a.html").write_text(
        "<!doctype html><title>here</title><a href=b.html>go</a><p id=t></p><script>"
        "t.textContent = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'</script>"
    )
    page = new_page(dark=True, width=390)
    page.goto((tmp_path / "a.html").as_uri())
    assert page.locator("#t").text_content() == "dark"
    assert page.evaluate("innerWidth") == 390
    page.get_by_role("link", name="go").click()
    assert page.title() == "there"


def test_the_network_is_off(browser, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Asked without ``new_page``, which would fail this test for asking."""
    (tmp_path / "a.html").write_text(
        "<!doctype html><img src='http://example.com/x.png' onerror=\"document.title='no'\">"
    )
    context = browser.new_context()
    page: Page = context.new_page()
    page.goto((tmp_path / "a.html").as_uri())
    page.wait_for_function("document.title === 'no'", timeout=10_000)
    context.close()
