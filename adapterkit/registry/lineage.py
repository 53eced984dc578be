"""Lineage: what a version was made from, and what was made of it, by content digest.

A node is an artefact (one content), which may be registered under several names and versions. A parent that is not
registered here still shows, under the label its child gave it. The same files on both sides of an operation (a merge
that changed nothing) make a loop, which is shown once and not followed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.errors import NotFound, RegistryError
from adapterkit.registry import index, resolve, store
from adapterkit.registry.canonical import thaw
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.identity import Identity, compare
from adapterkit.registry.index import Index, VersionRow
from adapterkit.registry.record import Parent, Record

_MAX_NODES = 2000


@dataclass(frozen=True)
class Node:
    """An artefact. ``key`` is its content digest, or ``identity:...`` for a base known by identity alone; ``refs`` are
    its registered versions, the meant one first, and none when it is not registered here.
    """

    key: str
    label: str
    kind: str
    method: str
    refs: tuple[str, ...]
    aliases: tuple[str, ...]
    digest: str
    hidden: bool


@dataclass(frozen=True)
class Edge:
    """``child`` was made from ``parent`` (both node keys) by an operation; ``parameters`` join those of both."""

    parent: str
    child: str
    role: str
    operation: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Lineage:
    """All ancestors and descendants of ``root`` (a node key); ``cut`` when there were more nodes than asked for."""

    root: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    cut: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: root, nodes, edges."""
        return {
            "root": self.root,
            "nodes": [{**node.__dict__, "refs": list(node.refs), "aliases": list(node.aliases)} for node in self.nodes],
            "edges": [{**edge.__dict__, "parameters": thaw(edge.parameters)} for edge in self.edges],
            "cut": self.cut,
        }


def lineage(
    ref: str, *, up: bool = True, down: bool = True, most: int = _MAX_NODES, home: Path | None = None
) -> Lineage:
    """The lineage of a version, at most ``most`` nodes and the nearest first; every record that takes part is read from
    its file and checked.

    Raises:
        NotFound, UsageError: as for any reference.
        RegistryError: the record meant is damaged.
    """
    at = open_home(home)
    record = resolve.find(at, ref)
    return index.ask(at, lambda found: _Walk(at, found, most).run(record, up, down))


def ancestors(
    home: Home, record: Record, operations: Sequence[str], roles: Sequence[str], most: int = _MAX_NODES
) -> list[Record]:
    """The records of what a record was made of, as far as a registry has them, over parents of some roles; of what some
    operations made.

    Raises:
        RegistryError: the registry is of a newer layout.
    """
    if not home.exists or not record.parents:
        return []
    return index.ask(home, lambda found: _Walk(home, found, most).above(record, operations, roles))


def parents_of(record: Record) -> tuple[Parent, ...]:
    """The parents of a record; of one that states none, the base it was trained on."""
    if record.parents or record.base is None or not (record.base.known or record.base.id):
        return record.parents
    return (Parent("base", identity=record.base, label=record.base.label),)


class _Walk:
    def __init__(self, home: Home, found: Index, most: int) -> None:
        self.home = home
        self.most = most
        self.index = found
        self.nodes: dict[str, Node] = {}
        self.edges: dict[tuple[str, str, str, str], Edge] = {}
        self.found: dict[tuple[str, Identity | None, str], list[VersionRow]] = {}
        self.bases: dict[Identity, str] = {}
        self.cut = False

    def run(self, record: Record, up: bool, down: bool) -> Lineage:
        (row,) = self.index.rows("name = ? and version = ?", (record.name, record.version), hidden=True)
        root = self._node(row)
        if up:
            self._up(row, set())
        if down:
            self._down(row, set())
        return Lineage(root, tuple(self.nodes.values()), tuple(self.edges.values()), self.cut)

    def above(self, record: Record, operations: Sequence[str], roles: Sequence[str]) -> list[Record]:
        """See `ancestors`."""
        found: dict[str, Record] = {}
        todo = deque([record])
        while todo and len(found) < self.most:
            for parent in todo.popleft().parents:
                rows = self._parent_rows(parent)[:1] if parent.role in roles else []
                for one in (one for row in rows for one in self._records(row)):
                    if one.digest not in found and one.operation is not None and one.operation.name in operations:
                        found[one.digest] = one
                        todo.append(one)
        return list(found.values())

    def _up(self, row: VersionRow, seen: set[str]) -> None:
        todo = deque([row])
        while todo:
            here = todo.popleft()
            if here.digest in seen or self._full():
                continue
            seen.add(here.digest)
            for record in self._records(here):
                for parent in parents_of(record):
                    rows = self._parent_rows(parent)
                    key = self._node(rows[0], rows) if rows else self._unregistered(parent)
                    self._edge(key, record, parent)
                    todo += rows[:1]

    def _down(self, row: VersionRow, seen: set[str]) -> None:
        todo = deque([row])
        while todo:
            here = todo.popleft()
            if here.content in seen or self._full():
                continue
            seen.add(here.content)
            for child in self.index.children(here):
                record = None if self._full() else self._record(child)
                if record is None:
                    continue
                self._child(child)
                for parent in parents_of(record):
                    rows = self._parent_rows(parent)
                    if any(found.content == here.content for found in rows):
                        self._edge(here.content, record, parent)
                todo.append(child)

    def _full(self) -> bool:
        self.cut = self.cut or len(self.nodes) >= self.most
        return self.cut

    def _records(self, row: VersionRow) -> list[Record]:
        """The version itself when it says what it was made from, else the newest of the same content that does."""
        own = self._record(row)
        if own is None or parents_of(own):
            return [own] if own else []
        for other in reversed(self.index.by_content(row.content)):
            if other.digest != row.digest and (record := self._record(other)) and parents_of(record):
                return [record]
        return []

    def _record(self, row: VersionRow) -> Record | None:
        """The record from its file; None when that is damaged, which fsck tells."""
        try:
            return store.load_known(self.home, row.name, row.version)
        except (NotFound, RegistryError):
            return None

    def _parent_rows(self, parent: Parent) -> list[VersionRow]:
        key = (parent.content, parent.identity, parent.record)
        if key not in self.found:  # many children of one base ask the same
            self.found[key] = self._find_parent(parent)
        return self.found[key]

    def _find_parent(self, parent: Parent) -> list[VersionRow]:
        rows = self.index.by_content(parent.content) if parent.content else []
        if not rows and parent.identity is not None:
            rows = self.index.by_identity(parent.identity)
        # The version the child meant comes first, then what is visible, the newest before the older.
        return sorted(rows, key=lambda row: (row.digest != parent.record, row.hidden, -row.version))

    def _node(self, row: VersionRow, rows: list[VersionRow] | None = None) -> str:
        if row.content not in self.nodes:
            others = rows if rows is not None else self.index.by_content(row.content)
            names = [f"{other.name}@{other.version}" for other in (row, *others) if other.content == row.content]
            refs = tuple(dict.fromkeys(names))
            aliases = tuple(dict.fromkeys(alias for other in (row, *others) for alias in other.aliases))
            self.nodes[row.content] = Node(
                row.content, refs[0], row.kind, row.method, refs, aliases, row.digest, row.hidden
            )
        return row.content

    def _child(self, row: VersionRow) -> None:
        """The node of what was made: its newest version in sight first, since later ones carry more evidence."""
        same = [other for other in self.index.by_content(row.content) if other.name == row.name]
        self._node(max(same, key=lambda other: (not other.hidden, other.version), default=row))

    def _unregistered(self, parent: Parent) -> str:
        identity = parent.identity
        label = parent.label or (identity.label if identity else f"sha256 {parent.content[:12]}")
        key = parent.content or self._by_identity(identity)
        self.nodes.setdefault(key, Node(key, label, "base" if parent.role == "base" else "", "", (), (), "", False))
        return key

    def _by_identity(self, identity: Identity | None) -> str:
        """The key of a base that is known by identity alone; one base, also where its children know other levels of it."""
        if identity is None:
            return "identity:"
        if identity not in self.bases:
            same = (key for other, key in self.bases.items() if compare(identity, other).fits)
            self.bases[identity] = next(same, f"identity:{identity.sampled or identity.label}")
        return self.bases[identity]

    def _edge(self, parent_key: str, child: Record, parent: Parent) -> None:
        operation = child.operation.name if child.operation else ""
        joined = {**(child.operation.parameters if child.operation else {}), **parent.parameters}
        edge = Edge(parent_key, child.content, parent.role, operation, joined)
        self.edges[edge.parent, edge.child, edge.role, operation] = edge


# How lines of a tree are drawn: (branch, last branch, bar, gap).
_UNICODE = ("├─ ", "└─ ", "│  ", "   ")
_ASCII = ("|- ", "`- ", "|  ", "   ")


def tree_text(lineage: Lineage, ascii_only: bool = False) -> str:
    """The lineage as two trees for a terminal: what it was made from, and what was made of it."""
    marks = _ASCII if ascii_only else _UNICODE
    nodes = {node.key: node for node in lineage.nodes}
    up: dict[str, list[tuple[Edge, str]]] = {}
    down: dict[str, list[tuple[Edge, str]]] = {}
    for edge in lineage.edges:
        up.setdefault(edge.child, []).append((edge, edge.parent))
        down.setdefault(edge.parent, []).append((edge, edge.child))
    root = nodes[lineage.root]
    lines = [describe(root)]
    for title, graph in (("made from", up), ("made of it", down)):
        if lineage.root in graph:
            lines += ["", title, *_branches(lineage.root, graph, nodes, marks, title == "made from")]
    if lineage.cut:
        lines += ["", f"and more: only the first {_MAX_NODES} are shown"]
    return "\n".join(lines) + "\n"


def _branches(
    root: str, graph: Mapping[str, list[tuple[Edge, str]]], nodes: Mapping[str, Node], marks: Sequence[str], roles: bool
) -> Iterator[str]:
    seen = {root}
    stack = [(edge, key, "", place == 0) for place, (edge, key) in enumerate(reversed(graph[root]))]
    while stack:
        edge, key, indent, last = stack.pop()
        loop = key in seen and key in graph
        said = f"{edge.role}: " if roles else f"{edge.operation}: " if edge.operation else ""
        yield indent + marks[1 if last else 0] + said + describe(nodes[key]) + (" (shown above)" if loop else "")
        if not loop:
            seen.add(key)
            deeper = indent + marks[3 if last else 2]
            below = enumerate(reversed(graph.get(key, [])))
            stack += [(edge, key, deeper, place == 0) for place, (edge, key) in below]


def describe(node: Node) -> str:
    """One line about a node; characters that a terminal would obey are escaped."""
    label = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in node.label)
    facts = [fact for fact in (node.kind, node.method) if fact]
    facts += [f"sha256:{node.digest[:12]}"] if node.digest else ["not registered here"]
    facts += [f"[{', '.join(node.aliases)}]"] if node.aliases else []
    facts += ["removed"] if node.hidden else []
    return f"{label}  {'  '.join(facts)}"


def mermaid(lineage: Lineage) -> str:
    """The lineage as a Mermaid flowchart, parents above children."""
    ids = {node.key: f"n{place}" for place, node in enumerate(lineage.nodes)}
    lines = ["flowchart TD"]
    for node in lineage.nodes:
        kind = " ".join(fact for fact in (node.kind, node.method) if fact)
        lines.append(f'  {ids[node.key]}["{_quoted(node.label)}{"<br/>" + _quoted(kind) if kind else ""}"]')
    for edge in lineage.edges:
        text = " ".join(part for part in (edge.operation, f"({edge.role})") if part)
        lines.append(f'  {ids[edge.parent]} -->|"{_quoted(text)}"| {ids[edge.child]}')
    lines += [f"  style {ids[lineage.root]} stroke-width:3px"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Text inside Mermaid's double quotes: letters, digits and a few marks as they are, the rest as character codes."""
    return "".join(char if char.isalnum() or char in " @.-_/:()" else f"#{ord(char)};" for char in text)
