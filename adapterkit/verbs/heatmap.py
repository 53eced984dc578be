"""A comparison as one HTML file: no script from elsewhere, no fonts, readable in the dark."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapterkit.foreign import for_page

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adapterkit.verbs.compare import CompareReport, LayerComparison, Pair

# attribute: (title, what it says, value to colour in [-1, 1])
_MEASURES: dict[str, tuple[str, str, Callable[[float], float]]] = {
    "cosine": ("Cosine", "1 the same direction, 0 unrelated, -1 opposed", lambda v: v),
    "output_overlap": ("Output overlap", "share of the output directions in common, 0 to 1", lambda v: v),
    "input_overlap": ("Input overlap", "share of the input directions in common, 0 to 1", lambda v: v),
    "sign_conflict": ("Sign conflict", "share of entries with opposite signs, 0.5 unrelated", lambda v: 1 - 2 * v),
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --line: #d5d9de; --none: #eef0f2; --dim: #666d75;
  --plus: 22, 120, 90; --minus: 190, 50, 40; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #14171a; --line: #363c43; --none: #1f2429;
  --dim: #9aa2ab; --plus: 70, 190, 150; --minus: 240, 100, 85; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; } p { margin: .3rem 0; color: var(--dim); }
ol { padding-left: 1.4rem; } .scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: right; padding: 2px 6px; white-space: nowrap; }
thead th { text-align: center; } td { text-align: center; padding: 2px 6px; min-width: 3.2rem; border-radius: 3px; }
td.none { background: var(--none); color: var(--dim); }
"""


def heat_map(report: CompareReport) -> str:
    """The page: who is compared, every pair in total, and per measure a map of all layers."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width"><title>Adapters compared</title>',
        f"<style>{_STYLE}</style></head><body><h1>Adapters compared</h1><ol>",
        *(f"<li>{for_page(ref)}</li>" for ref in report.adapters),
        "</ol><h2>In total</h2>",
        _table(
            [title for title, _, _ in _MEASURES.values()],
            [(_name(pair), [_cell(pair, name) for name in _MEASURES]) for pair in report.total],
        ),
    ]
    columns, rows = _grid(report.layers)
    for pair in report.total:
        for name, (title, says, _) in _MEASURES.items():
            parts.append(f"<h2>{title}, {_name(pair)}</h2><p>{says}</p>")
            body = []
            for row in rows:
                found = [_of(rows[row].get(column), pair) for column in columns]
                body.append((row, [_cell(one, name) for one in found]))
            parts.append(_table(columns, body))
    return "".join(parts) + "</body></html>\n"


def _name(pair: Pair) -> str:
    return f"{pair.one + 1} and {pair.other + 1}"


def _grid(layers: Sequence[LayerComparison]) -> tuple[list[str], dict[str, dict[str, LayerComparison]]]:
    """Layers by number (row) and by what they are called in each (column)."""
    columns: dict[str, None] = {}
    rows: dict[str, dict[str, LayerComparison]] = {}
    for layer in layers:
        row, column = place(layer.module)
        columns[column] = None
        rows.setdefault(row, {})[column] = layer
    return list(columns), rows


def place(name: str) -> tuple[str, str]:
    """Row and column of a tensor in a map of layers: the layer's number (``-`` without one), and what it is called there."""
    numbers = _NUMBER.findall(name)
    column = _NUMBER.sub("*", name.removesuffix(".weight"))
    return ".".join(numbers) or "-", column.rpartition("*.")[2] if numbers else column


def _of(layer: LayerComparison | None, pair: Pair) -> Pair | None:
    pairs = () if layer is None else layer.pairs
    return next((one for one in pairs if (one.one, one.other) == (pair.one, pair.other)), None)


def _cell(pair: Pair | None, name: str) -> str:
    if pair is None:
        return '<td class="none">&ndash;</td>'
    value = float(getattr(pair, name))
    shade = max(-1.0, min(1.0, _MEASURES[name][2](value)))
    colour = "plus" if shade >= 0 else "minus"
    return f'<td style="background:rgba(var(--{colour}),{min(0.85, abs(shade)):.2f})">{value:.2f}</td>'


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{for_page(column)}</th>' for column in columns)
    body = "".join(f'<tr><th scope="row">{for_page(name)}</th>{"".join(cells)}</tr>' for name, cells in rows)
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
