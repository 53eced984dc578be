"""The documentation as a site: built strictly, then opened in a real browser with the network off."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

import pytest

from adapterkit.cli import VERBS

if TYPE_CHECKING:
    from browser import NewPage
    from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
pytest.importorskip("mkdocs", reason="MkDocs is missing: pip install 'adapterkit[docs]'")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as ``make docs`` builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(built: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(built)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def pages(built: Path) -> list[str]:
    return sorted(path.parent.relative_to(built).as_posix() for path in built.rglob("index.html"))


def test_no_page_names_another_host_to_load_from(built: Path) -> None:
    for path in built.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=[\"']?([^\"' >]+)", path.read_text())
        assert loaded
        assert not [url for url in loaded if urlsplit(url).netloc], path


def test_the_command_line_is_all_there(built: Path) -> None:
    text = (built / "reference/cli/index.html").read_text()
    for verb in VERBS:
        assert f'<h2 id="{verb}">' in text
    assert "adapterkit build RECIPE.toml --locked\n" in text  # the example stands as it is, line by line
    assert "\b" not in text
    assert "[text|json|github]" in text


def test_the_python_reference_has_signatures_and_sentences(built: Path) -> None:
    text = (built / "reference/api/index.html").read_text()
    for name in ("adapterkit.verbs.merge.merge", "adapterkit.recipe.run.build", "adapterkit.errors.AdapterkitError"):
        assert f'id="{name}"' in text
    assert "Fold adapters into a base and write a Hugging Face folder" in text


def test_every_page_opens_without_a_complaint(built: Path, site: str, page: Page) -> None:
    """The fixture fails on anything beyond the loopback interface and on errors of the console."""
    for name in pages(built):
        page.goto(urljoin(site, f"{name}/" if name != "." else ""))
        assert page.locator("h1").first.is_visible()


def test_a_reader_finds_the_way_to_a_recipe(site: str, page: Page) -> None:
    page.goto(site)
    page.get_by_role("link", name="Recipes", exact=True).first.click()
    page.wait_for_url("**/recipes/")
    assert page.get_by_role("heading", name="The lock").is_visible()
    page.get_by_role("table").first.scroll_into_view_if_needed()
    page.get_by_role("link", name="In CI").first.click()
    page.wait_for_url("**/tutorials/ci/")


def test_search_works_without_a_network(site: str, page: Page) -> None:
    page.goto(site)
    page.keyboard.press("s")  # the keyboard opens it
    page.keyboard.type("rsLoRA", delay=20)
    found = page.locator(".md-search-result__link").first
    found.wait_for()
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: url != site)
    assert "rsLoRA" in page.locator("article").inner_text()


def test_at_night(site: str, new_page: NewPage) -> None:
    colours = []
    for dark in (False, True):
        page = new_page(dark=dark)
        page.goto(site)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, night = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert light > 600 > 300 > night


@pytest.mark.parametrize("name", ["", "recipes/", "worse/", "methods/", "reference/cli/"])
def test_on_a_phone_nothing_sticks_out(name: str, site: str, new_page: NewPage) -> None:
    page = new_page(width=390, height=800)
    page.goto(urljoin(site, name))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
