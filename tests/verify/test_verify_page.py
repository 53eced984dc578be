"""The page in a real browser: what it says, keyboard, dark colours, paper; and that markup in names stays text."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from adapterkit.verbs.verify import html, markdown
from adapterkit.verbs.verify.report import Finding

if TYPE_CHECKING:
    from pathlib import Path

    from browser import NewPage
    from playwright.sync_api import Page

    from adapterkit.verbs.verify.report import VerifyReport

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


@pytest.fixture(scope="module")
def address(broken_report: VerifyReport, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html(broken_report), encoding="utf-8")
    return path.as_uri()


def test_what_it_says(page: Page, address: str, broken_report: VerifyReport) -> None:
    page.goto(address)
    assert page.title() == "broken: not verified"
    assert page.get_by_role("heading", level=1).text_content() == "Not what was trained: layer missing"
    finding = page.locator(".findings > li.error").first
    assert "the 7 tensors of layer 1 equal the base" in (finding.text_content() or "")
    assert page.locator("#map-retention td").count() == 14
    assert page.locator("#map-retention td.wrong").count() == 7
    body = page.locator("body").text_content() or ""
    for one in broken_report.inputs:
        assert one.digest in body
    assert broken_report.model is not None
    for prompt in broken_report.model.prompts:
        assert prompt.text in body
    assert page.locator(".spark").count() == 3


def test_the_map_under_the_keyboard(page: Page, address: str) -> None:
    page.goto(address)
    assert page.locator(".map:visible").count() == 1
    page.locator("input[value=map-retention]").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#map-error").is_visible()
    assert not page.locator("#map-retention").is_visible()
    page.keyboard.press("ArrowLeft")
    cells = page.locator("#map-retention td")
    assert [cells.nth(i).get_attribute("tabindex") for i in range(3)] == ["0", "-1", "-1"]
    cells.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    told = page.locator(".told").text_content() or ""
    assert told.startswith("model.layers.1.self_attn.v_proj.weight: layer missing, retention 0.000")


def test_without_scripts_everything_is_there(new_page: NewPage, address: str) -> None:
    page = new_page(java_script_enabled=False)
    page.goto(address)
    assert page.locator("#map-retention").is_visible()
    assert "model.layers.0.mlp.up_proj.weight" in (
        page.locator("#map-retention td").nth(2).get_attribute("title") or ""
    )


def contrast(page: Page, where: str) -> float:
    """The WCAG contrast of a text against the nearest ground that is not transparent."""
    return float(
        page.eval_on_selector(
            where,
            """one => {
              const parse = (c) => c.match(/[\\d.]+/g).map(Number);
              const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255;
                return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
                return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
              const grounds = [];
              for (let at = one; at; at = at.parentElement) grounds.unshift(parse(getComputedStyle(at).backgroundColor));
              let ground = [255, 255, 255];
              for (const [r, g, b, a = 1] of grounds) ground = [r, g, b].map((v, i) => v * a + ground[i] * (1 - a));
              const [x, y] = [light(parse(getComputedStyle(one).color)), light(ground)].sort((p, q) => q - p);
              return (x + 0.05) / (y + 0.05);
            }""",
        )
    )


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_both_schemes(dark: bool, new_page: NewPage, address: str) -> None:
    page = new_page(dark=dark)
    page.goto(address)
    for where in (
        "h1",
        ".badge",
        ".findings b",
        ".findings .hint",
        "#map-retention td",
        "#map-retention td.wrong",
        "mark",
    ):
        assert contrast(page, where) > 4.5, where
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) is dark


def test_a_phone_scrolls_tables_and_not_the_page(new_page: NewPage, address: str) -> None:
    page = new_page(width=390, height=800)
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_on_paper(page: Page, address: str) -> None:
    page.goto(address)
    page.emulate_media(media="print")
    assert not page.locator(".switch").is_visible()
    assert page.locator(".map:visible").count() == 5  # all measures, each with its caption
    assert page.locator("#map-error caption").is_visible()
    assert len(page.pdf()) > 10_000


def test_markup_in_names_stays_text(new_page: NewPage, broken_report: VerifyReport, tmp_path: Path) -> None:
    nasty = '</code><script>document.title = "no"</script>|`x`'
    finding = Finding("other base", "error", f"'{nasty}' differs", nasty, (nasty, nasty))
    model = broken_report.model
    assert model is not None
    prompt = replace(
        model.prompts[0], text=nasty, partings=tuple(replace(p, before=nasty) for p in model.prompts[0].partings)
    )
    report = replace(
        broken_report,
        merged=nasty,
        adapters=(nasty,),
        findings=(finding,),
        model=replace(model, prompts=(prompt,)),
        options={"base16": nasty},
    )
    path = tmp_path / "nasty.html"
    path.write_text(html(report), encoding="utf-8")
    page = new_page()
    page.goto(path.as_uri())
    assert page.title().endswith("not verified")
    assert page.locator("script").count() == 1
    text = markdown(report)
    assert "<script>" not in text
    assert len({line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| ❌")}) == 1


def test_it_needs_nothing_from_anywhere(broken_report: VerifyReport) -> None:
    page = html(broken_report)
    assert not re.findall(r"(?:src|href)=[\"'](?!#|\.\.[\"'])", page)  # the one up is a link
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert len(page) < 200_000
