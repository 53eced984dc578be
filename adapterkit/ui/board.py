"""What is deployed now: where every alias points, since when, by whom, on what evidence, and which servers serve it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import AdapterkitError
from adapterkit.registry import index, refs, served, store
from adapterkit.registry.base_names import base_names
from adapterkit.registry.figures import joined
from adapterkit.registry.gathered import same_content
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.record import Record
from adapterkit.registry.served import Served
from adapterkit.ui.markup import Content, Markup, el
from adapterkit.ui.parts import code, frame, kind_mark, ref_link, version_url, when
from adapterkit.ui.words import Said, sentences

if TYPE_CHECKING:
    from adapterkit.registry.index import Index

SHOWN = 6  # on the first page
PAGE = 100
_LIVE = ("prod", "production", "live", "release", "stable", "canary", "staging")  # the order in which aliases are told


@dataclass(frozen=True)
class PointedVersion:
    """One alias: the version that it points to, its move, the servers that were told to serve it, and its evidence."""

    name: str
    alias: str
    version: int
    kind: str = ""
    method: str = ""
    base: str = ""
    at: str = ""
    by: str = ""
    why: str = ""
    servers: tuple[Served, ...] = ()
    digest: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """The aliases of one page, and how many there are; ``stray`` is what servers serve without an alias."""

    rows: tuple[PointedVersion, ...]
    total: int
    stray: tuple[Served, ...]


def board(home: Path | None = None, *, page: int = 1, size: int = SHOWN, of: str = "") -> Board:
    """What is deployed, what servers serve first.

    Args:
        of: only the aliases of this name.
    """
    at = open_home(home)
    try:
        running = served.serving(home=at.root)
    except AdapterkitError:
        running = ()  # fsck tells
    by_alias: dict[tuple[str, str], list[Served]] = {}
    for one in running:
        by_alias.setdefault((one.name, one.alias), []).append(one)

    def ask(found: Index) -> list[tuple[str, str, int, str, str, str]]:
        asked = (
            "select a.name, a.alias, a.version, r.kind, r.method, r.base from aliases a "
            "join records r on r.name = a.name and r.version = a.version"
        )
        return found.db.execute(f"{asked} where a.name = ?" if of else asked, (of,) if of else ()).fetchall()

    rows = index.ask(at, ask) if at.exists else []
    place = {alias: number for number, alias in enumerate(_LIVE)}
    rows.sort(key=lambda row: (row[:2] not in by_alias, place.get(row[1], 99), row[1], row[0]))
    known = {row[:2] for row in rows}
    stray = tuple(one for one in running if not of and (one.name, one.alias) not in known)
    rows, total = rows[(page - 1) * size : page * size], len(rows)
    records = {row[:2]: record for row in rows if (record := _record(at, row)) is not None}

    def same(found: Index) -> dict[str, list[tuple[str, int, str]]]:
        return {record.content: found.places(record.content) for record in records.values()}

    places = index.ask(at, same) if records else {}  # one question for all of them
    shown = []
    for row in rows:
        servers = tuple(by_alias.get(row[:2], ()))
        record = records.get(row[:2])
        evidence = joined(same_content(at, record, places.get(record.content, ()))) if record is not None else None
        shown.append(_deployed(at, row, servers, record, evidence or {}))
    return Board(tuple(shown), total, stray)


def _record(at: Home, row: tuple[str, str, int, str, str, str]) -> Record | None:
    try:
        return store.load_known(at, row[0], row[2])
    except AdapterkitError:
        return None  # fsck tells


def _deployed(
    at: Home,
    row: tuple[str, str, int, str, str, str],
    servers: tuple[Served, ...],
    record: Record | None,
    evidence: Mapping[str, Any],
) -> PointedVersion:
    name, alias, version, kind, method, base = row
    try:
        move = refs.get(at, name, alias)
    except AdapterkitError:
        record = None
    if record is None:
        return PointedVersion(name, alias, version, kind, method, base, servers=servers)
    since, by, why = (move.at, move.by, move.why) if move is not None else ("", "", "")
    return PointedVersion(name, alias, version, kind, method, base, since, by, why, servers, record.digest, evidence)


def section(found: Board, names: Mapping[str, str], heading: str = "Deployed now") -> Markup | None:
    """The board as a part of a page; nothing where nothing has an alias."""
    if not found.rows and not found.stray:
        return None
    more = None
    if found.total > len(found.rows):
        more = el("p", el("a", f"All {found.total:,} aliases", href="/deployed"), class_="more")
    return el(
        "section",
        el("h2", heading, el("span", f"{found.total:,}", class_="count")),
        el("ul", [_card(row, names) for row in found.rows], [_stray(one) for one in found.stray], class_="board"),
        more,
        class_="deployed",
        id="deployed",
    )


def _card(row: PointedVersion, names: Mapping[str, str]) -> Markup:
    base = names.get(row.base, row.base)
    said = sentences(row.evidence)
    return el(
        "li",
        el(
            "h3",
            el("a", f"{row.name}@{row.alias}", href=version_url(row.name, row.version)),
            " is ",
            ref_link(row.name, row.version, f"version {row.version}"),
        ),
        el("p", kind_mark(row.kind), row.kind, f", {row.method}" if row.method else None, f", on {base}" if base else None,
           class_="quiet"),
        el(
            "p",
            ["since ", when(row.at)] if row.at else None,
            f", by {row.by}" if row.by else None,
            f": {row.why}" if row.why else None,
            class_="since",
        ),
        where(row),
        words(said) if said else el("p", "Nothing was measured of it.", class_="quiet"),
    )  # fmt: skip


def where(row: PointedVersion) -> Markup:
    """Which servers serve an alias, and whether they serve what it says now."""
    if not row.servers:
        return el("p", "No server is known to serve it.", class_="quiet")
    items = []
    for one in row.servers:
        right = one.digest == row.digest
        share = f", {one.share:.0%} of requests" if one.share != 1 else ""
        text = f"{one.server} serves {'it' if right else f'version {one.version}'}{share}, since "
        said = f"{f', by {one.by}' if one.by else ''}{'' if right else ': the alias has moved on'}"
        items.append(el("li", text, when(one.since), said, class_="server" if right else "server bad"))
    return el("ul", items, class_="servers")


def _stray(one: Served) -> Markup:
    return el(
        "li",
        el("h3", ref_link(one.name, one.version)),
        el("p", f"{one.server} serves it", " since ", when(one.since), f", by {one.by}" if one.by else None),
        el("p", "No alias says so.", class_="quiet"),
    )


def words(said: Iterable[Said]) -> Markup:
    """Sentences on evidence as a list; verdicts say in words, too, whether they held."""
    items = []
    for one in said:
        mark: Content = None
        if one.good is not None:
            mark = el("span", "held" if one.good else "did not hold", class_=f"badge {'good' if one.good else 'bad'}")
        items.append(el("li", mark, one.text))
    return el("ul", items, class_="words")


def page(home: Home, number: int = 1) -> bytes:
    """All aliases, a hundred on a page."""
    found = board(home.root, page=number, size=PAGE)
    names = index.ask(home, base_names) if home.exists else {}
    pages = max(1, -(-found.total // PAGE))
    links = [
        el("a", "← Previous", href=f"/deployed?page={number - 1}", rel="prev") if number > 1 else None,
        el("span", f"page {number} of {pages}"),
        el("a", "Next →", href=f"/deployed?page={number + 1}", rel="next") if number < pages else None,
    ]
    shown = section(found, names, "Aliases") or el(
        "p", "No alias points anywhere. ", code("adapterkit tag"), " sets one."
    )
    main = el(
        "main",
        el("nav", el("a", "Adapters", href="/"), " / deployed", class_="crumbs", aria_label="Where you are"),
        el("h1", "Deployed now"),
        shown,
        el("nav", links, class_="pager", aria_label="Pages") if pages > 1 else None,
        id="content",
    )
    return frame("Deployed now", main, home=home)
