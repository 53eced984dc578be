"""The page of one version: what it is, how it is used, what it was made from and what was made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapterkit.errors import NotFound
from adapterkit.registry import evaluation, refs, verbs
from adapterkit.registry import verification as verified
from adapterkit.registry.gathered import gathered
from adapterkit.registry.home import Home, open_home, read_file
from adapterkit.registry.identity import Identity
from adapterkit.registry.lineage import Edge, Lineage, Node, lineage
from adapterkit.registry.record import KINDS, PROOF, FileEntry, Record
from adapterkit.registry.remaking import is_recipe
from adapterkit.registry.verbs import Shown
from adapterkit.registry.verification import Verification
from adapterkit.ui import board, card
from adapterkit.ui.graph import draw
from adapterkit.ui.markup import Content, Markup, el
from adapterkit.ui.parts import aliases, code, compare_url, figure, frame, kind_mark, ref_link, size, version_url, when
from adapterkit.ui.words import LABELS, sentences

NODES = 60  # that a drawing shows
PROOF_LIMIT = 16 << 20  # bytes of a page of verify that is shown
_MOVES = 20


def page(name: str, version: int, home: Path | None = None) -> bytes:
    """The page of a version as HTML.

    Raises:
        NotFound: there is none.
        RegistryError: its record is damaged.
        UsageError, UnsafeError: the name cannot be one.
    """
    ref = f"{name}@{version}"
    at = open_home(home)
    shown = verbs.show(ref, home=home)
    family = lineage(ref, most=NODES, home=home)
    record = shown.record
    main = el(
        "main",
        _head(shown),
        _deployed(board.board(home, of=name), record),
        _use(shown),
        _lineage(family),
        _evidence(shown, gathered(at, record)),
        card.section(at, record),
        _files(shown),
        id="content",
        class_="version",
    )
    moves = [move for alias in at.alias_names(name) for move in refs.history(at, name, alias)]
    aside = el(
        "aside", _versions(shown), _compare(shown), _facts(record), _moves(name, moves), aria_label=f"Facts of {ref}"
    )
    return frame(ref, main, aside, home=at)


def proof(name: str, version: int, home: Home) -> bytes:
    """The page of ``verify`` that a version keeps.

    Raises:
        NotFound: there is no such version, or it keeps none.
        RegistryError: its record is damaged.
    """
    shown = verbs.show(f"{name}@{version}", home=home.root)
    kept = _proof_of(shown)
    if kept is not None:
        return read_file(home.blob(kept.sha256))
    raise NotFound(f"{name}@{version} keeps no page of verify", "verify REF --html FILE --attach keeps one")


def _proof_of(shown: Shown) -> FileEntry | None:
    """The page of ``verify``, where its bytes are here and are no more than a page has."""
    files = (file for file in shown.record.files if file.path == PROOF and file.stored and file.size <= PROOF_LIMIT)
    return None if PROOF in shown.missing else next(files, None)


def _deployed(found: board.Board, record: Record) -> Markup | None:
    """Where this version is deployed, by the aliases that point to it."""
    rows = [row for row in found.rows if row.version == record.version]
    if not rows:
        return None
    items = [
        el(
            "li",
            el("b", row.alias),
            " points here",
            [" since ", when(row.at)] if row.at else None,
            f", by {row.by}" if row.by else None,
            f": {row.why}" if row.why else None,
            board.where(row),
        )
        for row in rows
    ]
    return el("section", el("h2", "Deployed"), el("ul", items, class_="pointed"), id="deployed")


def _compare(shown: Shown) -> Markup | None:
    """A form that needs no script: another version of the name, or any reference."""
    record = shown.record
    others = [version for version in reversed(shown.versions) if version != record.version][:50]
    return el(
        "section",
        el("h2", "Compare"),
        el(
            "form",
            el("input", type="hidden", name="a", value=record.ref),
            el("label", "With", for_="other"),
            el(
                "input",
                id="other",
                name="b",
                value=f"{record.name}@{others[0]}" if others else "",
                placeholder="name@version",
                autocomplete="off",
                spellcheck="false",
                required=True,
            ),
            el("button", "Compare", type="submit"),
            action="/compare",
            method="get",
            class_="compare-with",
        ),
        el("p", el("a", f"@{others[0]} beside this", href=compare_url(f"{record.name}@{others[0]}", record.ref)))
        if others
        else None,
        id="compare",
    )


def _head(shown: Shown) -> Content:
    record = shown.record
    base = record.base.label if record.base else ""
    kind = el(
        "p", kind_mark(record.kind), KINDS[record.kind], f", {record.method}" if record.method else None, class_="what"
    )
    on = el("p", "base ", el("b", base), class_="what") if base else None
    gone = el("p", "This version was removed; ", code(f"adapterkit remove --restore {record.ref}"), " brings it back.")
    bytes_gone = f"{len(shown.missing)} of {len(record.files)} files have lost their bytes."
    missing = el("p", f"{bytes_gone} Run ", code("adapterkit fsck"), " to see why.", class_="notice bad", role="alert")
    return (
        el("nav", el("a", "Adapters", href="/"), " / ", record.name, class_="crumbs", aria_label="Where you are"),
        el(
            "div",
            el("h1", record.name, el("span", f"@{record.version}", class_="at")),
            aliases(record.name, [(alias, record.version) for alias in shown.aliases], record.version),
            class_="title",
        ),
        kind,
        on,
        el("div", gone, class_="notice") if shown.hidden else None,
        missing if shown.missing else None,
    )


def commands(shown: Shown) -> list[tuple[str, str]]:
    """``(what for, command)``: how this version is used, by the alias that points to it if there is one."""
    record = shown.record
    ref = f"{record.name}@{shown.aliases[0]}" if shown.aliases else record.ref
    base = record.base.id if record.base is not None and record.base.id else "BASE"
    gguf = any(file.path.endswith(".gguf") for file in record.files)
    found = []
    if record.kind in ("adapter", "combined"):
        found += [
            ("Does it fit a base?", f"adapterkit check {base} {ref}"),
            ("Fold it into the base", f"adapterkit merge {base} {ref} -o merged"),
            ("Serve it on its base", f"adapterkit serve-args {ref} --for {'llama.cpp' if gguf else 'vllm'}"),
        ]
    elif record.kind == "base":
        found += [("What was made on it", f"adapterkit list --base {ref}")]
    else:
        found += [("Serve it", f"adapterkit serve-args {ref} --for {'llama.cpp' if gguf else 'vllm'}")]
        if not gguf:
            found += [("Make a GGUF of it", f"adapterkit convert {ref} -o {record.name}-Q4_K_M.gguf --quant Q4_K_M")]
    if record.kind != "base":
        found += [
            ("Publish it", f"adapterkit push {ref} ORG/{record.name}"),
            ("Take it along, with all it was made from", f"adapterkit export {ref} -o {record.name}.adapterkit"),
        ]
    return found


def _use(shown: Shown) -> Markup:
    rows = [
        el("div", el("dt", what), el("dd", el("pre", el("code", command), data_copy=True)))
        for what, command in commands(shown)
    ]
    return el("section", el("h2", "Use it"), el("dl", rows, class_="commands"), id="use")


def _lineage(family: Lineage) -> Markup:
    nodes = {node.key: node for node in family.nodes}
    made_from = [edge for edge in family.edges if edge.child == family.root and edge.parent != family.root]
    made_of_it = [edge for edge in family.edges if edge.parent == family.root and edge.child != family.root]
    drawing: Content = el(
        "p", "Nothing is known of where it came from, and nothing was made of it yet.", class_="quiet"
    )
    if made_from or made_of_it:
        scroll = el("div", draw(family), class_="scroll", tabindex=0, role="group", aria_label="Drawing of the lineage")
        lit = any(node.aliases for node in family.nodes)
        drawing = (
            scroll,
            el("p", "Thick lines lead to what an alias points to.", class_="quiet key") if lit else None,
            el("p", f"Only the nearest {NODES} are drawn; adapterkit lineage prints more.", class_="quiet")
            if family.cut
            else None,
            el(
                "div",
                _relatives("Made from", "made-from", [(edge, nodes[edge.parent]) for edge in made_from], True),
                _relatives("Made of it", "made-of-it", [(edge, nodes[edge.child]) for edge in made_of_it], False),
                class_="two",
            ),
        )
    return el("section", el("h2", "Lineage"), drawing, id="lineage")


def _relatives(title: str, name: str, found: list[tuple[Edge, Node]], roles: bool) -> Markup:
    items = []
    for edge, node in found:
        registered, _, version = node.refs[0].rpartition("@") if node.refs else ("", "", "")
        label: Content = ref_link(registered, int(version)) if registered else el("span", node.label, class_="outside")
        weight = edge.parameters.get("weight")
        said = ", ".join(
            part
            for part in (
                edge.role if roles else f"by {edge.operation}" if edge.operation else "",
                f"weight {weight:g}" if isinstance(weight, (int, float)) and weight != 1 else "",
                "not registered here" if not registered else "",
            )
            if part
        )
        items.append(el("li", kind_mark(node.kind), label, el("span", said, class_="said")))
    listed = el("ul", items) if items else el("p", "nothing" if not roles else "nothing is recorded", class_="quiet")
    return el("div", el("h3", title), listed, id=name, class_="relatives")


def _evidence(shown_version: Shown, evidence: Mapping[str, Any]) -> Markup:
    """What is known of the bytes, whichever version it was added to: in words, then every figure."""
    record, said = shown_version.record, sentences(evidence)
    shown: list[Markup] = [_level(level) for level in verified.read(evidence)]
    if scores := evaluation.read_shown(evidence)[0]:
        shown.append(_scores(scores))
    for kind, values in evidence.items():
        if kind not in (verified.KEY, evaluation.KEY):
            rows = [(LABELS.get(name, name), value) for name, value in values.items()]
            shown.append(el("div", el("h3", kind), _table(rows), class_="card"))
    none = el(
        "p",
        "No figures yet: ",
        *(code("merge --fidelity"), ", ", code("verify"), ", ", code("evaluate"), " and ", code("evidence add")),
        " add them.",
        class_="quiet",
    )
    own = "" if record.evidence or not evidence else "It was added to another version with the same bytes."
    cards = el("div", shown, class_="cards") if shown else none
    told = el("p", own, class_="quiet") if own else None
    link = el("a", "The page that verify wrote", href=f"{version_url(record.name, record.version)}/verify/")
    page = el("p", link) if _proof_of(shown_version) is not None else None
    words = board.words(said) if said else None
    return el("section", el("h2", "Evidence"), words, page, told, cards, id="evidence")


def _scores(scores: tuple[evaluation.Score, ...]) -> Markup:
    rows = []
    for one in scores:
        spread = f" ± {one.stderr:.2g}" if one.stderr is not None else ""
        whose = "" if one.subject == evaluation.SELF else f"{one.subject}: "
        over = f"of {one.n:,}" if one.n else "of an unstated number"
        made = ", ".join(part for part in (one.when[:10], f"{one.tool} {one.tool_version}".strip()) if part)
        cells = el("th", f"{whose}{one.label}", scope="row"), el("td", f"{one.value:.4g}{spread}"), el("td", over)
        rows.append(el("tr", *cells, el("td", made, class_="limit")))
    head = el("tr", [el("th", name, scope="col") for name in ("Figure", "Value", "Samples", "Measured")])
    table = el("table", el("thead", head), el("tbody", rows), class_="figures")
    scroll = el("div", table, class_="scroll", tabindex=0, role="group", aria_label="Evaluations")
    return el("div", el("h3", "evaluation"), scroll, class_="card wide")


def _level(level: Verification) -> Markup:
    limits = dict(level.thresholds)
    rows: list[Markup] = []
    for name, value in level.figures.items():
        option = next((key for key in limits if key == name or key.partition("_")[2] == name), "")
        limit = f"{option.partition('_')[0]} {figure(limits.pop(option))}" if option else ""
        label = el("th", LABELS.get(name, name), scope="row", title=name)
        rows.append(el("tr", label, el("td", figure(value)), el("td", limit, class_="limit")))
    rows += [
        el("tr", el("th", name, scope="row"), el("td"), el("td", figure(limit), class_="limit"))
        for name, limit in limits.items()
    ]
    verdict = el("span", "held" if level.ok else "did not hold", class_=f"badge {'good' if level.ok else 'bad'}")
    made = ", ".join(part for part in (level.when[:10], f"{level.tool} {level.tool_version}") if part)
    return el(
        "div",
        el("h3", f"verification: {level.level} ", verdict),
        el("table", el("tbody", rows), class_="figures"),
        el("p", made, class_="quiet"),
        class_="card",
    )


def _files(shown: Shown) -> Markup | None:
    record = shown.record
    if not record.files:
        return None
    absent = "made again when needed" if is_recipe(record) else "not kept here"
    rows = [
        el(
            "tr",
            el(
                "td",
                file.path,
                el("span", " its bytes are missing", class_="bad") if file.path in shown.missing else None,
            ),
            el(
                "td",
                size(file.size) if file.stored else absent,
                class_="number",
            ),
            el("td", el("code", file.sha256[:16], title=file.sha256), class_="sum"),
        )
        for file in record.files
    ]
    head = el("tr", [el("th", name, scope="col") for name in ("File", "Size", "sha256")])
    heading = el("h2", "Files ", el("span", size(record.size), class_="count"))
    table = el(
        "div",
        el("table", el("thead", head), el("tbody", rows), class_="files"),
        class_="scroll",
        tabindex=0,
        role="group",
        aria_label="Files",
    )
    return el("section", heading, table, id="files")


def _versions(shown: Shown) -> Markup:
    record = shown.record
    items = [
        el(
            "li",
            el(
                "a",
                f"@{version}",
                href=version_url(record.name, version),
                aria_current="page" if version == record.version else None,
            ),
        )
        for version in reversed(shown.versions)
    ]
    first, rest = items[:12], items[12:]
    more = el("details", el("summary", f"{len(rest):,} older"), el("ul", rest, class_="versions")) if rest else None
    return el("section", el("h2", "Versions"), el("ul", first, class_="versions"), more, id="versions")


def _facts(record: Record) -> Content:
    operation = record.operation
    rows: list[tuple[str, Content]] = [("created", when(record.created))]
    if operation is not None:
        rows.append(("made by", f"{operation.name} ({operation.tool} {operation.tool_version})"))
    if record.origin is not None:
        rows.append(("pulled from", f"{record.origin.repo}@{record.origin.commit[:12]}"))
    rows += record.meta.items()
    rows += [("content", _digest(record.content)), ("record", _digest(record.digest))]
    settings = {**record.parameters, **(operation.parameters if operation else {})}
    said = [(key, value) for key, value in settings.items() if value not in (None, "", (), {}, False)]
    return (
        el("section", el("h2", "Facts"), _table(rows)),
        el("section", el("h2", "Parameters"), _table(said)) if said else None,
        _identity("Base", record.base),
        _identity("Its own weights", record.identity),
    )


def _identity(title: str, identity: Identity | None) -> Markup | None:
    if identity is None:
        return None
    rows: list[tuple[str, Content]] = [("id", identity.id)] if identity.id else []
    rows += [(level, _digest(identity.level(level).rpartition("@")[2])) for level in identity.known]
    return el("section", el("h2", title), _table(rows)) if rows else None


def _moves(name: str, moves: list[refs.Move]) -> Markup | None:
    if not moves:
        return None
    newest = sorted(moves, key=lambda move: (move.at, move.seq), reverse=True)[:_MOVES]
    items = [
        el(
            "li",
            el("b", move.alias),
            [" to ", ref_link(name, move.version, f"@{move.version}")] if move.version else " taken off",
            el(
                "span",
                when(move.at),
                f", by {move.by}" if move.by else None,
                ", a rollback" if move.undoes else None,
                f": {move.why}" if move.why else None,
                class_="said",
            ),
        )
        for move in newest
    ]
    return el("section", el("h2", "Moves of aliases"), el("ul", items, class_="moves"))


def _table(rows: Iterable[tuple[str, Any]]) -> Markup:
    cells = [
        el("tr", el("th", name, scope="row"), el("td", value if isinstance(value, Markup) else figure(value)))
        for name, value in rows
    ]
    return el("table", el("tbody", cells), class_="facts")


def _digest(text: str) -> Markup:
    return el("code", text[:12], title=text, data_copy_text=text)
