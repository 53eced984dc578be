"""A real headless Chromium for tests of pages: fixtures ``page`` and ``new_page``.

It is the distribution's browser (Debian: the package ``chromium``; another one by ``$CHROMIUM``), driven by Playwright,
which downloads nothing here. The network is off: no name resolves but the loopback's, and a test fails when its page asks
for anything beyond ``127.0.0.1``, ``localhost`` and ``file:``, or writes an error to the console.

    def test_a_page(page: Page) -> None:
        page.goto(url)
        page.get_by_role("link", name="my-merge@1").click()
        assert page.title() == ...

    def test_at_night_on_a_phone(new_page: NewPage) -> None:
        page = new_page(dark=True, width=390, height=800)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request

    NewPage = Callable[..., Page]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
_LOCAL = ("127.0.0.1", "localhost")


def chromium() -> str | None:
    """The path of the browser: ``$CHROMIUM``, else the first known name on the path."""
    return os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for the session."""
    path = chromium()
    if path is None:
        pytest.skip("no Chromium here: install the package chromium, or set CHROMIUM to the path of one")
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install 'adapterkit[test]'")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[NewPage]:
    """``new_page(dark=False, width=1280, height=800, **options)``: a page in a context (cookies, storage) of its own.

    ``options`` are those of Playwright's ``Browser.new_context``, such as ``java_script_enabled=False``.
    """
    faults: list[str] = []
    contexts = []

    def make(dark: bool = False, width: int = 1280, height: int = 800, **options: Any) -> Page:
        viewport = {"width": width, "height": height}
        context = browser.new_context(color_scheme="dark" if dark else "light", viewport=viewport, **options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        made = context.new_page()

        def asked(request: Request) -> None:
            url = urlsplit(request.url)
            if url.scheme in ("http", "https", "ws", "wss") and url.hostname not in _LOCAL:
                faults.append(f"the page asked for {request.url}")

        def said(message: ConsoleMessage) -> None:
            if message.type == "error":
                faults.append(f"the console says: {message.text}")

        def threw(error: Error) -> None:
            faults.append(f"the page threw: {error}")

        made.on("request", asked)
        made.on("console", said)
        made.on("pageerror", threw)
        return made

    yield make
    for context in contexts:
        context.close()
    assert not faults, "; ".join(faults)


@pytest.fixture
def page(new_page: NewPage) -> Page:
    """A page of 1280 x 800 in light colours."""
    return new_page()
