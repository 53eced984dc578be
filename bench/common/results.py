"""Stored results: what a script measured, when, with which version and where. README and docs take their figures from them.

A result is a file ``bench/results/NAME.json``::

    {"script": "speed merge", "command": "...", "measured": {"date", "commit", "version", "machine", "note"},
     "figures": {name: number}, "tables": {name: {"heads": [...], "formats": [...], "rows": [[...], ...]}}}

``python -m bench --save NAME KIND SCRIPT ...`` writes one: the tables that a script prints as Markdown, what it hands to
`note`, and the lines that it prints. ``python tools/figures.py`` puts stored figures into the pages. Small runs of the
proofs are stored as ``proofs/NAME``.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "results"
_NUMBER = re.compile(r"(-?)(\d[\d,]*)(?:\.(\d+))?(e[+-]\d+)?(.*)", re.DOTALL)
_NOTED: dict[str, Any] = {}


def note(**figures: float | str) -> None:
    """Figures of the script that is running, for its stored result."""
    _NOTED.update(figures)


def head(*heads: str) -> None:
    """Print the head of a table, which `save` stores."""
    print(_line(list(heads)) + "\n|" + "---|" * len(heads), flush=True)


def row(*cells: str) -> None:
    """Print a row of a table."""
    print(_line(list(cells)), flush=True)


def read(name: str) -> dict[str, Any]:
    """A stored result."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def names() -> list[str]:
    """All stored results."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def shown(table: dict[str, Any], figures: Mapping[str, Any] | None = None) -> str:
    """A stored table as Markdown. A text in it may name figures of the same result, as ``{seconds:.1f} s``."""
    known = figures or {}
    rows = [
        [
            "" if cell is None else form.format(cell.format(**known) if isinstance(cell, str) else cell)
            for form, cell in zip(table["formats"], row, strict=True)
        ]
        for row in table["rows"]
    ]
    lines = [_line(table["heads"]), table.get("rule", "|" + "---|" * len(table["heads"])), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def parsed(text: str) -> dict[str, Any]:
    """A Markdown table as it is stored: numbers where a whole column has them, with the form in which it shows them."""
    lines = [line.strip().removeprefix("|").removesuffix("|") for line in text.strip().splitlines()]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    heads, body = rows[0], rows[2:]
    columns = [_column([row[i] for row in body]) for i in range(len(heads))]
    values = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    rule = text.strip().splitlines()[1].strip()
    return {"heads": heads, "rule": rule, "formats": [form for form, _ in columns], "rows": values}


def _column(cells: list[str]) -> tuple[str, list[Any]]:
    forms, values = set(), []
    for cell in cells:
        if not cell:
            values.append(None)
            continue
        match = _NUMBER.fullmatch(cell)
        if match is None:
            return "{}", [_escaped(one) or None for one in cells]
        sign, whole, decimals, power, unit = match.groups()
        scale = 0.01 if unit == "%" else 1
        number = float(f"{sign}{whole.replace(',', '')}.{decimals or 0}{power or ''}")
        places = len(decimals or "")
        if unit == "%":
            forms.add(f"{{:.{places}%}}")
            number = round(number * scale, places + 4)
        elif power:
            forms.add(f"{{:.{places}e}}{_escaped(unit)}")
        else:
            forms.add(f"{{:{',' if ',' in whole else ''}.{places}f}}{_escaped(unit)}")
        values.append(number)
    return (forms.pop(), values) if len(forms) == 1 else ("{}", [_escaped(one) or None for one in cells])


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def save(name: str, script: str, command: str, printed: str) -> Path:
    """Store what a script noted, and the Markdown tables among what it printed."""
    tables = re.findall(r"(?:^\|.*\|$\n?){3,}", printed, re.MULTILINE)
    result = {
        "script": script,
        "command": command,
        "measured": where(),
        "figures": dict(_NOTED),
        "tables": {("main", *(f"table{n}" for n in range(2, 99)))[i]: parsed(text) for i, text in enumerate(tables)},
        "printed": printed.splitlines(),
    }
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def where() -> dict[str, str]:
    """Date, version and machine of a measurement made now."""
    from adapterkit import __version__

    root = FOLDER.parents[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True).stdout
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit.strip(),
        "version": __version__,
        "machine": f"{_cores()} cores, {platform.machine()}, Python {platform.python_version()}",
    }


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
