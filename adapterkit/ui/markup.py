"""HTML as values: whatever is not `Markup` already is escaped, so text from records can never become a tag."""

from __future__ import annotations

import html

from adapterkit.redaction import redact

_VOID = frozenset({"meta", "link", "input", "br", "img"})


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


Content = object
"""What may stand inside an element: Markup, text, numbers, lists of those; None and False are left out."""


def text(value: object) -> str:
    """A value as text for a reader: no secret, and nothing that does not print."""
    plain = redact(str(value))
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in plain)


def render(content: Content) -> Markup:
    """HTML of any content."""
    if content is None or content is False:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, (list, tuple)):
        return Markup("".join(map(render, content)))
    return Markup(html.escape(text(content)))


def el(tag: str, *content: Content, **attributes: object) -> Markup:
    """An element. ``class_`` and ``for_`` lose their underscore, others turn ``_`` into ``-``; None leaves one out."""
    parts = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        parts.append(name if value is True else f'{name}="{html.escape(text(value))}"')
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if tag in _VOID else f"{opening}{render(content)}</{tag}>")


def document(title: str, *body: Content) -> bytes:
    """A whole page."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{title} · adapterkit"),
        el("link", rel="icon", href="/static/icon.svg", type="image/svg+xml"),
        el("link", rel="stylesheet", href="/static/ui.css"),
        el("script", src="/static/ui.js", defer=True),
    )
    return f"<!doctype html>\n{el('html', head, el('body', *body), lang='en')}\n".encode()
