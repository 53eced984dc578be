"""The first page: what is registered, by the base it belongs to. Answered by the index alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from adapterkit.errors import counted
from adapterkit.registry import index
from adapterkit.registry.base_names import base_names
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.record import KINDS
from adapterkit.ui import board
from adapterkit.ui.markup import Content, Markup, el
from adapterkit.ui.parts import aliases, badges, code, figure, frame, kind_mark, ref_link, when

if TYPE_CHECKING:
    from adapterkit.registry.index import Index, Unreadable, VersionRow

PAGE = 100
NO_BASE = "no base recorded"


@dataclass(frozen=True)
class Query:
    """What of the registry is asked for; empty fields ask for all. ``page`` counts from 1.

    ``figure`` is the name of one that has to be known, between ``least`` and ``most`` where those are numbers; ``sort`` is
    ``high`` or ``low`` (by that figure) or ``new``.
    """

    q: str = ""
    kind: str = ""
    base: str = ""
    page: int = 1
    figure: str = ""
    least: str = ""
    most: str = ""
    sort: str = ""

    @property
    def plain(self) -> bool:
        """Whether nothing is asked for: the first page."""
        return self == Query()

    def url(self, **changes: object) -> str:
        """The address of this query with some fields changed."""
        fields = {**self.__dict__, "page": 1, **changes}
        said = {key: value for key, value in fields.items() if value not in ("", 1)}
        return f"/?{urlencode(said)}" if said else "/"


@dataclass(frozen=True)
class NameEntry:
    """One name: its newest version in sight, how many there are, its aliases as ``(alias, version)``, and the figure that
    was asked for."""

    row: VersionRow
    versions: int
    aliases: tuple[tuple[str, int], ...]
    figure: float | None = None


@dataclass(frozen=True)
class Group:
    """The names that belong to one base; ``count`` of them pass the query, and ``entries`` are those of this page."""

    base: str
    count: int
    entries: tuple[NameEntry, ...]


@dataclass(frozen=True)
class Overview:
    """The groups of one page; ``bases`` are all bases with the number of their names, ``names`` passed the query."""

    query: Query
    groups: tuple[Group, ...]
    bases: tuple[tuple[str, int], ...]
    kinds: tuple[tuple[str, int], ...]
    names: int
    total: int
    versions: int
    pages: int
    unreadable: tuple[Unreadable, ...]
    figures: tuple[str, ...] = ()
    names_of_bases: Mapping[str, str] = field(default_factory=dict)


def overview(query: Query, home: Path | None = None) -> Overview:
    """What the first page shows."""
    return index.ask(open_home(home), lambda found: _overview(found, query))


def _overview(found: Index, query: Query) -> Overview:
    rows = found.rows()
    newest = {row.name: row for row in rows}
    count: dict[str, int] = {}
    pointed: dict[str, list[tuple[str, int]]] = {}
    for row in rows:
        count[row.name] = count.get(row.name, 0) + 1
        if row.aliases:
            pointed.setdefault(row.name, []).extend((alias, row.version) for alias in row.aliases)
    named = base_names(found)
    words = query.q.lower().split()
    all_bases: dict[str, int] = {}
    kinds: dict[str, int] = {}
    passed: dict[str, list[VersionRow]] = {}
    values = _values(found, query.figure)
    least, most = _number(query.least, -math.inf), _number(query.most, math.inf)
    for row in newest.values():
        base = named.get(row.digest if row.kind == "base" else row.base, row.base) or NO_BASE
        all_bases[base] = all_bases.get(base, 0) + 1
        text = f"{row.name} {row.method} {base} {' '.join(alias for alias, _ in pointed.get(row.name, ()))}".lower()
        if (query.base and base != query.base) or not all(word in text for word in words):
            continue
        if query.figure and not least <= values.get(row.digest, math.nan) <= most:
            continue
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
        if not query.kind or row.kind == query.kind:
            passed.setdefault(base, []).append(row)
    order = {kind: place for place, kind in enumerate(("base", *KINDS))}
    by = partial(_place, query, values, order)
    flat = [
        (base, row)
        for base in sorted(passed, key=lambda base: (base == NO_BASE, -len(passed[base]), base.lower()))
        for row in sorted(passed[base], key=by)
    ]
    pages = max(1, -(-len(flat) // PAGE))
    page = min(query.page, pages)
    groups: dict[str, list[NameEntry]] = {}
    for base, row in flat[(page - 1) * PAGE : page * PAGE]:
        told = tuple(sorted(pointed.get(row.name, ())))
        entry = NameEntry(row, count[row.name], told, values.get(row.digest) if query.figure else None)
        groups.setdefault(base, []).append(entry)
    return Overview(
        replace(query, page=page),
        tuple(Group(base, len(passed[base]), tuple(entries)) for base, entries in groups.items()),
        tuple(sorted(all_bases.items(), key=lambda item: (item[0] == NO_BASE, -item[1], item[0].lower()))),
        tuple((kind, kinds[kind]) for kind in order if kind in kinds),
        len(flat),
        len(newest),
        len(rows),
        pages,
        found.unreadable(),
        tuple(name for (name,) in found.db.execute(_COMMON, (_FIGURES,))),
        named,
    )


def _place(query: Query, values: Mapping[str, float], order: Mapping[str, int], row: VersionRow) -> tuple[Any, ...]:
    """What rows are sorted by within their base."""
    if query.sort in ("high", "low") and query.figure:
        return (values[row.digest] * (-1 if query.sort == "high" else 1), row.name)
    if query.sort == "new":
        return (*(-ord(char) for char in row.created), row.name)
    return (order[row.kind], row.name)


_FIGURES = 60  # names of figures that can be chosen
_COMMON = "select name from figures group by name order by count(*) desc, name limit ?"


def _values(found: Index, figure: str) -> dict[str, float]:
    """The value of a figure by the digest of the record that carries it."""
    if not figure:
        return {}
    return dict(found.db.execute("select digest, value from figures where name = ?", (figure,)).fetchall())


def _number(text: str, otherwise: float) -> float:
    try:
        found = float(text)
    except ValueError:
        return otherwise
    return otherwise if math.isnan(found) else found


def page(found: Overview, home: Home) -> bytes:
    """The first page as HTML: what is deployed, then everything."""
    if not found.total and not found.unreadable:
        return frame("Registry", _empty(home), home=home)
    query = found.query
    title = query.base or "Registry"
    body = (
        _unreadable(found.unreadable),
        el("nav", *_bases(found), class_="bases", aria_label="Bases"),
        el(
            "main",
            board.section(board.board(home.root), found.names_of_bases) if query.plain else None,
            el("h1", title) if query.base else el("h1", "Adapters", class_="quiet-title"),
            _summary(found),
            _chooser(found),
            el("nav", *_kinds(found), class_="kinds", aria_label="Kinds"),
            [_group(group, query) for group in found.groups] or _nothing(query),
            _pager(found),
            id="content",
        ),
    )
    kept = {key: value for key, value in query.__dict__.items() if key not in ("q", "page")}
    return frame(title, *body, home=home, query=query.q, hidden=kept, side=True)


def _chooser(found: Overview) -> Markup | None:
    """A form to filter and sort by a figure."""
    query = found.query
    if not found.figures:
        return None
    names = list(dict.fromkeys([*([query.figure] if query.figure else []), *found.figures]))
    options = [el("option", "any figure", value="")]
    options += [el("option", name, value=name, selected=name == query.figure) for name in names]
    sorts = [("", "by kind and name"), ("high", "highest first"), ("low", "lowest first"), ("new", "newest first")]
    kept = [(key, getattr(query, key)) for key in ("q", "kind", "base")]
    return el(
        "form",
        [el("input", type="hidden", name=key, value=value) for key, value in kept if value],
        el("label", "Figure ", el("select", options, name="figure")),
        [
            el("label", f"{word} ", el("input", name=key, value=getattr(query, key), inputmode="decimal", size=6))
            for key, word in (("least", "from"), ("most", "to"))
        ],
        el(
            "label",
            "Sorted ",
            el(
                "select",
                [el("option", text, value=key, selected=key == query.sort) for key, text in sorts],
                name="sort",
            ),
        ),
        el("button", "Show", type="submit"),
        action="/",
        method="get",
        class_="chooser",
        aria_label="Filter and sort by a figure",
    )


def _summary(found: Overview) -> Markup:
    some = f"{found.names:,} of " if found.names != found.total else ""
    shown = f"{some}{counted(found.total, 'name')}, {counted(found.versions, 'version')} in all"
    return el("p", shown, class_="summary")


def _bases(found: Overview) -> Iterable[Content]:
    query = found.query
    yield el("h2", "Bases")
    items: list[Markup] = [_base_item("All", found.total, query.url(base=""), not query.base)]
    shown = found.bases[:40]
    items += [_base_item(base, n, query.url(base=base), base == query.base) for base, n in shown]
    yield el("ul", items)
    if len(found.bases) > len(shown):
        yield el("p", f"and {len(found.bases) - len(shown):,} more: search for them", class_="more")


def _base_item(base: str, count: int, url: str, current: bool) -> Markup:
    label = el("span", base, class_="label", title=base)
    return el(
        "li",
        el("a", label, el("span", f"{count:,}", class_="count"), href=url, aria_current="page" if current else None),
    )


def _kinds(found: Overview) -> Iterable[Markup]:
    query = found.query
    total = sum(count for _, count in found.kinds)
    for kind, count in (("", total), *found.kinds):
        yield el(
            "a",
            kind_mark(kind) if kind else None,
            kind or "all kinds",
            el("span", f"{count:,}", class_="count"),
            href=query.url(kind=kind),
            aria_current="true" if kind == query.kind else None,
            class_="chip",
        )


def _group(group: Group, query: Query) -> Markup:
    titles = ["Name", "Kind", "Aliases", "Evidence", *(["Figure"] if query.figure else []), "Created"]
    head = el("tr", [el("th", name, scope="col", class_=name.lower()) for name in titles])
    heading = None
    if not query.base:
        link = el("a", group.base, href=query.url(base=group.base)) if group.base != NO_BASE else group.base
        heading = el("h2", el("span", link, class_="base"), el("span", f"{group.count:,}", class_="count"))
    rows = el("table", el("thead", head), el("tbody", [_row(entry) for entry in group.entries]), class_="list")
    return el("section", heading, rows, class_="group")


def _row(entry: NameEntry) -> Markup:
    row = entry.row
    versions = el("span", f"{entry.versions:,} versions", class_="versions") if entry.versions > 1 else None
    method = el("span", row.method, class_="method") if row.method else None
    return el(
        "tr",
        el(
            "td",
            ref_link(row.name, row.version, row.name),
            el("span", f"@{row.version}", class_="at"),
            versions,
            class_="name",
        ),
        el("td", kind_mark(row.kind), row.kind, " ", method, class_="kind"),
        el("td", aliases(row.name, entry.aliases, row.version), class_="aliases"),
        el("td", badges(row.evidence), class_="evidence"),
        el("td", figure(entry.figure), class_="figure") if entry.figure is not None else None,
        el("td", when(row.created), class_="created"),
    )


def _pager(found: Overview) -> Markup | None:
    if found.pages < 2:
        return None
    page, query = found.query.page, found.query
    back = el("a", "← Previous", href=query.url(page=page - 1), rel="prev") if page > 1 else el("span", "← Previous")
    on = el("a", "Next →", href=query.url(page=page + 1), rel="next") if page < found.pages else el("span", "Next →")
    return el("nav", back, el("span", f"page {page} of {found.pages}"), on, class_="pager", aria_label="Pages")


def _unreadable(found: Sequence[Unreadable]) -> Markup | None:
    if not found:
        return None
    first = found[0]
    some = "1 record cannot" if len(found) == 1 else f"{len(found):,} records cannot"
    said = f"{some} be read and {'is' if len(found) == 1 else 'are'} not shown, {first.name}@{first.version} for one."
    return el("p", said, " Run ", code("adapterkit fsck"), " to see why.", class_="notice bad", role="alert")


def _nothing(query: Query) -> Markup:
    return el(
        "div",
        el("p", "Nothing fits."),
        el("p", el("a", "Show everything", href="/")),
        class_="nothing",
    )


def _empty(home: Home) -> Markup:
    return el(
        "main",
        el("h1", "Nothing is registered yet"),
        el("p", "The registry in ", code(str(home.root)), " is empty. Register an adapter, and it appears here:"),
        el("pre", el("code", "adapterkit register my-adapter/ --name my-adapter --base org/base"), data_copy=True),
        el("p", "No adapter at hand? ", code("adapterkit demo"), " trains a tiny one."),
        class_="empty",
        id="content",
    )
