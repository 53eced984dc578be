"""What all pages share: the frame around them, links to versions, badges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from adapterkit.registry.home import Home
from adapterkit.registry.record import UNDATED
from adapterkit.ui.markup import Content, Markup, document, el


def frame(
    title: str,
    *body: Content,
    home: Home,
    query: str = "",
    hidden: Mapping[str, str] | None = None,
    side: bool = False,
    compare: tuple[str, str] = ("", ""),
) -> bytes:
    """A page with the bar on top; ``hidden`` fields go along with a search, ``side`` leaves room for a column."""
    search = el(
        "form",
        el("label", "Search", for_="q", class_="unseen"),
        el(
            "input",
            id="q",
            name="q",
            type="search",
            value=query,
            placeholder="Search names, bases, aliases",
            autocomplete="off",
            spellcheck="false",
        ),
        el("kbd", "/", aria_hidden="true"),
        [el("input", type="hidden", name=key, value=value) for key, value in (hidden or {}).items() if value],
        action="/",
        method="get",
        role="search",
    )
    links = el(
        "nav",
        el("a", "Deployed", href="/deployed"),
        el("a", "Compare", href=compare_url(*compare)) if all(compare) else None,
        class_="tops",
        aria_label="Pages of the registry",
    )
    header = el(
        "header",
        el("a", "Skip to the content", href="#content", class_="skip"),
        el("a", mark(), el("span", "adapterkit"), href="/", class_="brand"),
        search,
        links,
        el("span", place(home), class_="home", title="Where this registry lives"),
        class_="bar",
    )
    return document(title, header, el("div", *body, class_="page with-side" if side else "page"))


def place(home: Home) -> str:
    """The folder of a registry, with ``~`` for the user's own."""
    try:
        return f"~/{home.root.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(home.root)


def mark() -> Markup:
    """The sign: two factors that make one square."""
    return Markup(
        '<svg viewBox="0 0 24 24" width="22" height="22" aria-hidden="true">'
        '<rect x="2" y="2" width="6" height="20" rx="2" class="mark-b"></rect>'
        '<rect x="10" y="2" width="12" height="6" rx="2" class="mark-a"></rect>'
        '<rect x="10" y="10" width="12" height="12" rx="2" class="mark-w"></rect></svg>'
    )


def version_url(name: str, version: int) -> str:
    """The address of a version's page."""
    return f"/v/{quote(name)}/{version}"


def compare_url(one: str, other: str) -> str:
    """The address of the comparison of two versions."""
    return f"/compare?{urlencode({'a': one, 'b': other})}"


def size(nbytes: float) -> str:
    """``1.23 GB``"""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def figure(value: Any) -> str:
    """A value of a record for a reader."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(figure, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {figure(item)}" for key, item in value.items())
    return str(value)


def ref_link(name: str, version: int, label: str = "") -> Markup:
    """A link to a version."""
    return el("a", label or f"{name}@{version}", href=version_url(name, version))


def kind_mark(kind: str) -> Markup:
    """The coloured dot of a kind; the kind itself stands beside it as text."""
    return el("span", class_=f"dot kind-{kind or 'none'}", aria_hidden="true")


def aliases(name: str, found: Iterable[tuple[str, int]], shown: int) -> list[Markup]:
    """Aliases as links; one that points to another version than the one shown says to which."""
    return [
        el(
            "a",
            alias,
            el("span", f"@{version}", class_="at") if version != shown else None,
            href=version_url(name, version),
            class_="alias",
        )
        for alias, version in found
    ]


def badges(kinds: Iterable[str]) -> list[Markup]:
    """The kinds of evidence a version carries."""
    return [
        el("span", "verification failed", class_="badge bad")
        if kind == "verification-failed"
        else el("span", "verified" if kind == "verification" else kind, class_="badge good")
        for kind in kinds
    ]


def when(created: str) -> Markup | str:
    """A date, with the time for those who point at it."""
    if created == UNDATED:
        return "–"
    return el("time", created[:10], datetime=created, title=created)


def code(text: str) -> Markup:
    """A piece of code in a sentence."""
    return el("code", text)


def message(title: str, said: str, hint: str, home: Home) -> bytes:
    """A page that says what went wrong."""
    body = el(
        "main",
        el("h1", title),
        el("p", said),
        el("p", hint) if hint else None,
        el("p", el("a", "All adapters", href="/")),
        class_="empty",
        id="content",
    )
    return frame(title, body, home=home)
