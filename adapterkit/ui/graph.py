"""A lineage as a drawing: parents left of children, in SVG whose nodes are links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapterkit.registry.lineage import Edge, Lineage, Node
from adapterkit.ui.markup import Markup, el
from adapterkit.ui.parts import version_url

WIDTH, HEIGHT, ACROSS, BETWEEN, MARGIN = 196, 54, 52, 16, 8  # px: of a node, gaps between columns and rows, around all
LETTERS = 23  # that fit into a node
FITTING = 5  # columns that are rather made smaller than scrolled


@dataclass(frozen=True)
class GraphLayout:
    """The top left corner of every node by its key, how many columns there are, and the size of the whole, in px."""

    places: Mapping[str, tuple[float, float]]
    columns: int
    width: float
    height: float


def layout(lineage: Lineage) -> GraphLayout:
    """Columns by the longest way from an ancestor; rows in the order of what a node is joined to, to cross little."""
    parents: dict[str, list[str]] = {node.key: [] for node in lineage.nodes}
    children: dict[str, list[str]] = {node.key: [] for node in lineage.nodes}
    for edge in lineage.edges:
        if edge.parent != edge.child:
            parents[edge.child].append(edge.parent)
            children[edge.parent].append(edge.child)
    column = _columns(parents, children)
    columns: list[list[str]] = [[] for _ in range(max(column.values()) + 1)]
    for node in lineage.nodes:
        columns[column[node.key]].append(node.key)
    for turn in range(6):
        near, order = (parents, columns) if turn % 2 == 0 else (children, columns[::-1])
        place = {key: row - (len(keys) - 1) / 2 for keys in columns for row, key in enumerate(keys)}
        for keys in order:
            keys.sort(key=lambda key: _middle([place[other] for other in near[key]], place[key]))
            place |= {key: row - (len(keys) - 1) / 2 for row, key in enumerate(keys)}
    tallest = max(map(len, columns))
    height = tallest * (HEIGHT + BETWEEN) - BETWEEN + 2 * MARGIN
    places = {}
    for number, keys in enumerate(columns):
        top = (height - len(keys) * (HEIGHT + BETWEEN) + BETWEEN) / 2
        for row, key in enumerate(keys):
            places[key] = (MARGIN + number * (WIDTH + ACROSS), top + row * (HEIGHT + BETWEEN))
    return GraphLayout(places, len(columns), len(columns) * (WIDTH + ACROSS) - ACROSS + 2 * MARGIN, height)


def _columns(parents: Mapping[str, Sequence[str]], children: Mapping[str, Sequence[str]]) -> dict[str, int]:
    column = dict.fromkeys(parents, 0)
    waiting = {key: len(found) for key, found in parents.items()}
    todo = [key for key, count in waiting.items() if count == 0]
    while todo:
        key = todo.pop()
        for child in children[key]:
            column[child] = max(column[child], column[key] + 1)
            waiting[child] -= 1
            if waiting[child] == 0:
                todo.append(child)
    return column  # What is on a loop stays as far left as it can be told.


def _middle(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def draw(lineage: Lineage) -> Markup:
    """The drawing; its root is marked, and what is registered here can be clicked."""
    placed = layout(lineage)
    at = placed.places
    lit = deployed_path(lineage)
    lines = [
        el(
            "g",
            el("title", f"{edge.operation or 'made from'} ({edge.role})"),
            el("path", d=_curve(at[edge.parent], at[edge.child]), marker_end="url(#tip)"),
            class_=_edge_class(edge, lineage.root, lit),
        )
        for edge in lineage.edges
        if edge.parent != edge.child
    ]
    nodes = [_node(node, at[node.key], node.key == lineage.root, node.key in lit) for node in lineage.nodes]
    tip = Markup(
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0.5 L7.5 4 L0 7.5 z" class="tip"></path></marker></defs>'
    )
    width, height = f"{placed.width:g}", f"{placed.height:g}"
    return el(
        "svg",
        tip,
        lines,
        nodes,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        class_="graph fit" if placed.columns <= FITTING else "graph",
        role="group",
        aria_label="Lineage, parents on the left",
    )


def deployed_path(lineage: Lineage) -> set[str]:
    """The keys of nodes that an alias points to, and of everything that those were made from."""
    parents: dict[str, list[str]] = {}
    for edge in lineage.edges:
        parents.setdefault(edge.child, []).append(edge.parent)
    lit: set[str] = set()
    todo = [node.key for node in lineage.nodes if node.aliases]
    while todo:
        key = todo.pop()
        if key not in lit:
            lit.add(key)
            todo += parents.get(key, ())
    return lit


def _edge_class(edge: Edge, root: str, lit: set[str]) -> str:
    on = " on" if root in (edge.parent, edge.child) else ""
    return f"edge{on}{' lit' if edge.parent in lit and edge.child in lit else ''}"


def _curve(parent: tuple[float, float], child: tuple[float, float]) -> str:
    x, y = parent[0] + WIDTH, parent[1] + HEIGHT / 2
    to_x, to_y = child[0] - 1, child[1] + HEIGHT / 2
    bend = max(24.0, (to_x - x) / 2)
    return f"M{x:g} {y:g} C{x + bend:g} {y:g} {to_x - bend:g} {to_y:g} {to_x:g} {to_y:g}"


def _node(node: Node, at: tuple[float, float], root: bool, lit: bool) -> Markup:
    x, y = at
    kind = " · ".join(part for part in (node.kind, node.method) if part)
    if node.aliases:
        kind = f"{kind} · {', '.join(node.aliases)}"
    below = kind if node.refs else f"{kind + ' · ' if kind else ''}not registered"
    box = [
        el("title", node.label),
        el("rect", x=f"{x:g}", y=f"{y:g}", width=WIDTH, height=HEIGHT, rx=9),
        el("circle", cx=f"{x + 16:g}", cy=f"{y + 21:g}", r=4.5, class_=f"kind-{node.kind or 'none'}"),
        el("text", _short(node.label), x=f"{x + 29:g}", y=f"{y + 25.5:g}", class_="name"),
        el("text", _short(below, LETTERS + 6), x=f"{x + 29:g}", y=f"{y + 42:g}", class_="below"),
    ]
    marks = " ".join(
        word
        for word, there in (("root", root), ("lit", lit), ("gone", node.hidden), ("outside", not node.refs))
        if there
    )
    name, _, number = node.refs[0].rpartition("@") if node.refs else ("", "", "")
    if root or not node.refs:
        return el("g", box, class_=f"node {marks}".strip(), aria_current="true" if root else None)
    link = el("a", box, href=version_url(name, int(number)), aria_label=f"{node.label}, {kind}")
    return el("g", link, class_=f"node {marks}".strip())


def _short(text: str, most: int = LETTERS) -> str:
    """Text that fits: the middle goes, since names differ at their ends."""
    if len(text) <= most:
        return text
    end = most // 2
    return f"{text[: most - end - 1]}…{text[-end:]}"
