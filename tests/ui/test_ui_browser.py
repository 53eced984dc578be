"""`ui` in a real Chromium: from an adapter to what was made of it, by mouse and by keyboard, wide and narrow."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.cli import main
from adapterkit.provenance.register import register
from adapterkit.registry import served, verbs
from adapterkit.registry.evaluation import Score
from adapterkit.registry.evidence import attach_evaluation, attach_verification
from adapterkit.registry.fsck import fsck
from adapterkit.registry.verification import Verification

if TYPE_CHECKING:
    from browser import NewPage
    from playwright.sync_api import Page

Serve = Callable[[], str]


@pytest.fixture
def chain(home: Path, tmp_path: Path) -> dict[str, str]:
    """A base, an adapter on it, and the merge of both: registered for real. Their content digests by name."""
    base = plain_base(tmp_path / "base", shards=2)
    adapter = plain_adapter(tmp_path / "adapter", base, base_model_name_or_path="someone/base")
    register(base, "the-base", kind="base", base_id="someone/base")
    register(adapter, "tone", base=base, meta={"dataset": "tickets"})
    verbs.tag("tone", "prod")
    adapterkit.merge(base, ["tone@prod"], tmp_path / "out")
    register(tmp_path / "out", "desk")
    attach_verification("desk", [Verification("tensor", True, {"max_abs": 0.0}, {"max_abs": 1e-6})])
    return {name: verbs.show(name).record.content for name in ("the-base", "tone", "desk")}


def test_from_an_adapter_to_what_was_made_of_it(page: Page, serve: Serve, chain: dict[str, str]) -> None:
    page.goto(serve())
    assert page.title() == "Registry · adapterkit"
    assert page.locator("section.group h2 .base").all_text_contents() == ["someone/base"]
    page.get_by_role("link", name="tone", exact=True).click()
    assert page.locator("h1").text_content() == "tone@1"
    assert page.locator("#use code").first.text_content() == "adapterkit check someone/base tone@prod"
    # Down the lineage, in the drawing.
    page.locator("svg.graph").get_by_role("link", name="desk@2").click()
    page.wait_for_url("**/v/desk/2")
    assert page.locator(f"code[title='{chain['desk']}']").count() == 1
    assert page.locator("#evidence .card .badge").text_content() == "held"
    # And back up, in the list.
    made_from = page.locator("#made-from")
    assert made_from.get_by_role("link").all_text_contents() == ["the-base@1", "tone@1"]
    made_from.get_by_role("link", name="tone@1").click()
    page.wait_for_url("**/v/tone/1")
    assert page.locator("#made-of-it").get_by_role("link").all_text_contents() == ["desk@2"]


def test_search_filter_and_keys(page: Page, serve: Serve, chain: dict[str, str]) -> None:
    page.goto(serve())
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("desk")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?q=desk")
    assert page.locator("td.name a").all_text_contents() == ["desk"]
    page.goto(page.url.partition("?")[0])
    page.locator(".kinds").get_by_role("link", name="adapter").click()
    page.wait_for_url("**kind=adapter")
    assert page.locator("td.name a").all_text_contents() == ["tone"]
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url("**/v/tone/1")
    page.goto(page.url.partition("/v/")[0] + "/?q=nobody")
    assert "Nothing fits" in (page.locator("main").text_content() or "")


def test_a_command_is_copied(new_page: NewPage, serve: Serve, chain: dict[str, str]) -> None:
    page = new_page(permissions=["clipboard-read", "clipboard-write"])
    page.goto(f"{serve()}/v/desk/2")
    page.get_by_role("button", name="Copy: adapterkit serve-args desk@2 --for vllm").click()
    page.get_by_text("Copied", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "adapterkit serve-args desk@2 --for vllm"


def test_it_works_without_scripts(new_page: NewPage, serve: Serve, chain: dict[str, str]) -> None:
    page = new_page(java_script_enabled=False)
    page.goto(serve())
    page.get_by_role("link", name="tone", exact=True).click()
    page.locator("#made-of-it").get_by_role("link", name="desk@2").click()
    assert page.locator("h1").text_content() == "desk@2"


def test_nothing_runs_off_the_screen(page: Page, serve: Serve, chain: dict[str, str]) -> None:
    url = serve()
    for path in ("/", "/v/tone/1", "/v/desk/2", "/?q=nobody", "/deployed", "/compare?a=tone@1&b=desk@2"):
        page.goto(url + path)
        for width in (320, 390, 768, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """WCAG 2.2's contrast ratio of two sRGB colours."""

    def luminance(colour: tuple[int, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOURS = """() => {
    const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const name = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable);
    const rgb = (variable) => {
        probe.fillStyle = name(variable);
        probe.fillRect(0, 0, 1, 1);
        return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    return Object.fromEntries(["page", "card", "wash", "ink", "soft", "link", "good", "good-wash", "bad", "bad-wash"]
        .map((key) => [key, rgb("--" + key)]));
}"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read(new_page: NewPage, serve: Serve, chain: dict[str, str], dark: bool) -> None:
    """Contrast of 4.5 and more, as WCAG asks for text."""
    page = new_page(dark=dark)
    page.goto(serve())
    colours: dict[str, Any] = page.evaluate(COLOURS)
    pairs = [(text, ground) for text in ("ink", "soft", "link") for ground in ("page", "card", "wash")]
    for text, ground in [*pairs, ("good", "good-wash"), ("bad", "bad-wash"), ("bad", "page")]:
        assert contrast(tuple(colours[text]), tuple(colours[ground])) >= 4.5, (text, ground)


PAGES = (
    "/",
    "/v/tone/1",
    "/v/desk/2",
    "/deployed",
    "/compare?a=desk@1&b=desk@2",
    "/?figure=tickets/acc&sort=high",
    "/?q=nobody",
)


@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 390)])
def test_axe_finds_no_violation(new_page: NewPage, serve: Serve, chain: dict[str, str], dark: bool, width: int) -> None:
    """The rules of axe-core 4 for WCAG and good practice, on every kind of page."""
    package = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install 'adapterkit[test]'")
    attach_evaluation(
        "tone", [Score("tickets", "acc", 0.7, 0.02, 500), Score("tickets", "acc", 0.6, 0.02, 500, subject="base")]
    )
    served.record_serving("gpu-3", verbs.show("tone@1").record, served_as="tone@1", alias="prod")
    page = new_page(dark=dark, width=width, height=900)
    for path in PAGES:
        page.goto(serve() + path)
        found = package.Axe().run(page).response["violations"]
        told = [(one["id"], [node["html"][:160] for node in one["nodes"]][:3]) for one in found]
        assert told == [], path


def test_the_keyboard_reaches_everything(page: Page, serve: Serve, chain: dict[str, str]) -> None:
    page.goto(f"{serve()}/v/desk/2")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    reached: set[str] = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('section')?.id || document.activeElement.tagName"))
    assert {"use", "lineage", "card", "compare", "versions"} <= reached


def test_two_versions_are_compared(page: Page, serve: Serve, chain: dict[str, str]) -> None:
    page.goto(f"{serve()}/v/desk/2")
    page.get_by_label("With").fill("tone@1")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_url("**/compare?a=desk*")
    assert page.locator("h1").text_content() == "desk@2 and tone@1"
    differs = page.locator("#are tr.differs th").all_text_contents()
    assert any(text.startswith("kind") for text in differs)


def test_the_page_of_verify_and_back(
    page: Page, serve: Serve, chain: dict[str, str], tmp_path: Path, home: Path
) -> None:
    """`verify --html --attach` keeps its page with the version; each of the two pages leads to the other."""
    command = [
        "verify",
        "desk",
        "--base",
        str(tmp_path / "base"),
        "--adapter",
        "tone",
        "--attach",
        "--level",
        "tensors",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--html", str(tmp_path / "proof.html")])
    assert ended.value.code == 0
    kept = verbs.show("desk")
    assert kept.record.content == chain["desk"]  # the same model, and a page about it
    assert fsck(home=home).clean
    page.goto(f"{serve()}/v/desk/{kept.record.version}")
    page.get_by_role("link", name="The page that verify wrote").click()
    page.wait_for_url("**/verify/")
    assert page.locator("h1").text_content() == "What is deployed is what was trained"
    page.get_by_role("link", name="This version in the registry").click()
    page.wait_for_url(f"**/v/desk/{kept.record.version}/")
    assert page.locator("h1").text_content() == kept.record.ref
    text = (tmp_path / "proof.html").read_text()
    assert re.search(r"<p class=.dim.>20\d\d-\d\d-\d\d \d\d:\d\d UTC</p>", text)
    assert f"adapterkit verify desk --base {tmp_path / 'base'} --adapter tone" in text
    assert "(LoRA)" in text
    page.goto((tmp_path / "proof.html").as_uri())
    assert page.get_by_role("link", name="This version in the registry").count() == 0
