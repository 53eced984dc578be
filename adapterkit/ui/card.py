"""A model card as a part of a page: the README of a version, or the one that publishing would write.

Headings, lists, tables, code and paragraphs are told apart; everything else stays the text that it is. No HTML of a card is
ever taken over, and its links are shown as text: a page here leads nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from adapterkit.errors import AdapterkitError
from adapterkit.registry import blobs
from adapterkit.registry.home import Home
from adapterkit.registry.record import Record
from adapterkit.ui.markup import Content, Markup, el

LIMIT = 200_000  # bytes of a card that is shown


def section(at: Home, record: Record) -> Markup | None:
    """The card of a version."""
    if record.kind == "base":
        return None
    text, own = _text(at, record)
    if not text:
        return None
    said = "It comes with the version." if own else "push would write this one; the version has none of its own."
    return el(
        "section",
        el("h2", "Model card"),
        el("details", el("summary", said), el("div", list(blocks(text)), class_="card-text"), open=own),
        id="card",
    )


def _text(at: Home, record: Record) -> tuple[str, bool]:
    file = next((one for one in record.files if one.path == "README.md" and one.stored), None)
    if file is not None and blobs.has(at, file.sha256, file.size):
        return at.blob(file.sha256).read_bytes()[:LIMIT].decode("utf-8", "replace"), True
    from adapterkit.hub.card import card

    try:
        return card(record, f"ORG/{record.name}", None, "README.md").decode("utf-8", "replace"), False
    except AdapterkitError:
        return "", False


def blocks(text: str) -> Iterator[Content]:
    """Markdown as elements, as far as it is understood."""
    lines = text.replace("\r\n", "\n").split("\n")
    if lines and lines[0] == "---" and "---" in lines[1:]:
        end = lines.index("---", 1)
        yield el("pre", el("code", "\n".join(lines[1:end])), tabindex=0)
        lines = lines[end + 1 :]
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            end = next((k for k in range(at + 1, len(lines)) if lines[k].startswith("```")), len(lines))
            yield el("pre", el("code", "\n".join(lines[at + 1 : end])), tabindex=0)
            at = end + 1
        elif heading := re.match(r"(#{1,6})\s+(.*)", line):
            yield el("h3" if len(heading[1]) < 3 else "h4", _plain(heading[2]))
            at += 1
        elif re.match(r"\s*[-*]\s+", line):
            end = next((k for k in range(at, len(lines)) if not re.match(r"\s*[-*]\s+", lines[k])), len(lines))
            yield el("ul", [el("li", _plain(re.sub(r"^\s*[-*]\s+", "", one))) for one in lines[at:end]])
            at = end
        elif line.startswith("|"):
            end = next((k for k in range(at, len(lines)) if not lines[k].startswith("|")), len(lines))
            yield _table(lines[at:end])
            at = end
        elif not line.strip() or line.lstrip().startswith("<!--"):
            at += 1
        else:
            end = next((k for k in range(at, len(lines)) if not lines[k].strip()), len(lines))
            yield el("p", _plain(" ".join(lines[at:end])))
            at = end


def _table(lines: list[str]) -> Markup:
    rows = [[_plain(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines]
    rows = [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    if not rows:
        return el("p")
    head, *body = rows
    shown = el(
        "table",
        el("thead", el("tr", [el("th", cell, scope="col") if cell else el("td") for cell in head])),
        el("tbody", [el("tr", [el("td", cell) for cell in row]) for row in body]),
        class_="files",
    )
    return el("div", shown, class_="scroll", tabindex=0, role="group", aria_label="Table of the card")


def _plain(text: str) -> str:
    """Text without Markdown's marks; a link is its words and its address."""
    text = re.sub(r"!?\[([^\]]*)\]\(([^)]*)\)", r"\1 (\2)", text)
    return re.sub(r"(\*\*|__|`)", "", text)
