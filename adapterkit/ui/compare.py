"""Two versions side by side: what they are, how they were made, what was measured, and what changed in which layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import AdapterkitError, NotFound
from adapterkit.foreign import is_whole
from adapterkit.registry import evaluation, resolve
from adapterkit.registry import figures as known
from adapterkit.registry.canonical import parse
from adapterkit.registry.gathered import gathered
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.names import check_sha256
from adapterkit.ui.markup import Content, Markup, el
from adapterkit.ui.parts import code, figure, frame, kind_mark, ref_link, size

if TYPE_CHECKING:
    from adapterkit.registry.record import Record

LARGEST = 64_000_000  # bytes of an adapter that is read for a page where nobody kept its figures
_LAYERS = 200


def page(one: str, other: str, home: Path | None = None) -> bytes:
    """The page of a comparison.

    Raises:
        NotFound: one of them is not there, or not given.
        RegistryError, UsageError, UnsafeError: as for any reference.
    """
    at = open_home(home)
    if not one or not other:
        raise NotFound("a comparison takes two versions", "open one, and choose what to compare it with")
    a, b = resolve.find(at, one), resolve.find(at, other)
    main = el(
        "main",
        el("nav", el("a", "Adapters", href="/"), " / compare", class_="crumbs", aria_label="Where you are"),
        el("h1", f"{a.ref} and {b.ref}"),
        el("p", "The same bytes." if a.content == b.content else "Rows that differ are marked.", class_="quiet"),
        _section("What they are", "are", _facts(a), _facts(b), a, b),
        _section("Configuration", "config", _settings(a), _settings(b), a, b),
        _section("Evidence", "evidence", _evidence(at, a), _evidence(at, b), a, b),
        _files(a, b),
        _layers(at, a, b),
        id="content",
        class_="version compare",
    )
    return frame(f"{a.ref} and {b.ref}", main, home=at, compare=(a.ref, b.ref))


def _facts(record: Record) -> dict[str, Content]:
    made = record.operation
    return {
        "kind": f"{record.kind} {record.method}".strip(),
        "base": record.base.label if record.base else "",
        "made by": f"{made.name} ({made.tool} {made.tool_version})" if made else "",
        "made from": ", ".join(parent.label or parent.content[:12] for parent in record.parents),
        "size": size(record.size),
        "created": record.created[:10],
        **dict(record.meta),
    }


def _settings(record: Record) -> dict[str, Content]:
    settings = {**record.parameters, **(record.operation.parameters if record.operation else {})}
    return {key: figure(value) for key, value in settings.items() if value not in (None, "", (), {}, False)}


def _evidence(at: Home, record: Record) -> dict[str, Content]:
    evidence = gathered(at, record)
    found = {}
    if wrong := evaluation.read_shown(evidence)[1]:
        found[evaluation.KEY] = wrong
        del evidence[evaluation.KEY]
    for one in known.figures(evidence):
        spread = f" ± {one.stderr:.2g}" if one.stderr is not None else ""
        found[one.name] = f"{figure(one.value)}{spread}{f' ({one.about})' if one.about else ''}"
    return dict(found)


def _section(
    title: str, name: str, one: Mapping[str, Content], other: Mapping[str, Content], a: Record, b: Record
) -> Markup | None:
    keys = list(dict.fromkeys((*one, *other)))
    rows = [_row(key, one.get(key, ""), other.get(key, "")) for key in keys if one.get(key) or other.get(key)]
    none = el("p", "Nothing is known of either.", class_="quiet")
    return el("section", el("h2", title), _table(rows, a, b) if rows else none, id=name)


def _row(key: str, one: Content, other: Content) -> Markup:
    same = one == other
    mark = None if same else el("span", " differs", class_="unseen")
    cells = el("th", key, mark, scope="row"), el("td", one or "–"), el("td", other or "–")
    return el("tr", *cells, class_=None if same else "differs")


def _table(rows: list[Markup], a: Record, b: Record) -> Markup:
    head = el(
        "tr",
        el("td"),
        [el("th", kind_mark(one.kind), ref_link(one.name, one.version), scope="col") for one in (a, b)],
    )
    table = el("table", el("thead", head), el("tbody", rows), class_="both")
    return el("div", table, class_="scroll", tabindex=0, role="group", aria_label="Table of both versions")


def _files(a: Record, b: Record) -> Markup | None:
    one, other = ({file.path: file for file in record.files} for record in (a, b))
    rows = []
    for path in sorted({*one, *other}):
        mine, yours = one.get(path), other.get(path)
        same = mine is not None and yours is not None and mine.sha256 == yours.sha256
        said = [f"{size(file.size)}, {file.sha256[:12]}" if file else "" for file in (mine, yours)]
        rows.append(_row(path, said[0], said[0] if same else said[1]))
    return el("section", el("h2", "Files"), _table(rows, a, b), id="files") if rows else None


def _layers(at: Home, a: Record, b: Record) -> Markup | None:
    """The size of the change in every module, where both change weights by what can be looked at."""
    if any(record.kind not in ("adapter", "combined") for record in (a, b)):
        return None
    heading = el("h2", "Change by layer")
    try:
        one, other = (layer_figures(at.root, record.ref, record.content, record.size) for record in (a, b))
    except AdapterkitError as error:
        return el("section", heading, el("p", f"It cannot be shown: {error.message}.", class_="quiet"), id="layers")
    if not one or not other:
        hint = (code("adapterkit register --scan"), " keeps what this needs.")
        return el("section", heading, el("p", "Nobody looked into one of them. ", *hint, class_="quiet"), id="layers")
    most = max([*(v[0] for v in one.values()), *(v[0] for v in other.values())], default=0.0) or 1.0
    names = sorted({*one, *other}, key=_in_order)
    rows = []
    for name in names[:_LAYERS]:
        mine, yours = one.get(name), other.get(name)
        ratio = f"{yours[0] / mine[0]:.2f}" if mine and yours and mine[0] > 0 else "–"
        rows.append(el("tr", el("th", name.removesuffix(".weight"), scope="row"), *map(_bar, (mine, yours), (most, most)),
                       el("td", ratio, class_="number")))  # fmt: skip
    head = el("tr", el("th", "Weight", scope="col"), [el("th", one.ref, scope="col") for one in (a, b)],
              el("th", "Ratio", scope="col"))  # fmt: skip
    table = el("table", el("thead", head), el("tbody", rows), class_="both layers")
    cut = (
        el("p", f"Only the first {_LAYERS} of {len(names)} are shown.", class_="quiet")
        if len(names) > _LAYERS
        else None
    )
    about = "The length of the change, and its rank; the bar is on one scale for all."
    scroll = el("div", table, class_="scroll", tabindex=0, role="group", aria_label="Change by layer")
    return el("section", heading, el("p", about, class_="quiet"), scroll, cut, id="layers")


def _in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if is_whole(part) else (-1, part) for part in name.split(".")]


def _bar(found: tuple[float, int] | None, most: float) -> Markup:
    if found is None:
        return el("td", "not changed", class_="quiet")
    bar = el(
        "svg",
        el("rect", width=f"{100 * found[0] / most:.1f}", height=6, rx=3),
        viewBox="0 0 100 6",
        class_="bar-of",
        aria_hidden="true",
        preserveAspectRatio="none",
    )
    return el("td", bar, f"{found[0]:.3g}, rank {found[1]}")


def layer_figures(root: Path, ref: str, content: str, nbytes: int) -> dict[str, tuple[float, int]]:
    """Length and rank of the change by parameter: as a scan kept them, else read now from a small adapter; nothing is
    written.

    Raises:
        AdapterkitError: the adapter cannot be taken apart, or its bytes are not here.
    """
    kept: Any = None
    try:
        kept = parse((root / "scans" / check_sha256(content, "content")).read_bytes(), "figures")["figures"]
    except (AdapterkitError, OSError, TypeError, KeyError):
        kept = None
    if kept:
        return {one["parameter"]: (float(one["norm"]), int(one["rank"])) for one in kept}
    tree = root / "trees" / resolve.find(Home(root), ref).digest
    if nbytes > LARGEST or not tree.is_dir():
        return {}
    return _read(tree)


@lru_cache(maxsize=32)
def _read(tree: Path) -> dict[str, tuple[float, int]]:
    from adapterkit.adapters.load import load_adapter
    from adapterkit.adapters.scan import module_figures

    return {one.parameter: (one.norm, one.rank) for one in module_figures(load_adapter(tree))[0]}
