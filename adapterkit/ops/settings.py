"""A number that is not the same everywhere in a model: by names of tensors, and from the first layer to the last.

Written as rows, ``[{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.5}]``: the first row counts whose filter is a part of
the tensor's name, or that has none. A list of values goes evenly over the layers, straight between two of them; what is in no
layer has the first. mergekit's recipes say it so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.errors import UsageError

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_KEYS = frozenset({"filter", "value"})


@dataclass(frozen=True)
class Setting:
    """Rows of a filter ("" for all) and the values from the first layer to the last."""

    rows: tuple[tuple[str, tuple[Any, ...]], ...]

    def at(self, name: str, depth: float) -> Any:
        """The value for a tensor.

        Args:
            name: of the tensor.
            depth: 0 for the first layer, 1 for the last.
        """
        values = next(values for words, values in self.rows if words in name)
        if len(values) == 1:
            return values[0]
        place = depth * (len(values) - 1)
        first = int(place)
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            return values[first]
        second = min(len(values) - 1, first + 1)
        return (1 - (place - first)) * values[first] + (place - first) * values[second]

    def __str__(self) -> str:
        words = [f"{'/'.join(_word(v) for v in values)}{f' ({name})' if name else ''}" for name, values in self.rows]
        return ", ".join(words)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_setting(value: Any) -> bool:
    """Whether a value is written as rows."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(row, Mapping) for row in value)


def setting(rows: Sequence[Mapping[str, Any]], check: Callable[[Any], Any], where: str) -> Setting:
    """The rows as a value.

    Args:
        check: what a single value must be; gives it in its type.
        where: what to call it in an error.

    Raises:
        UsageError: a row has other keys, no value, or nothing counts for tensors that no filter names.
    """
    found = []
    for row in rows:
        if not row.keys() <= _KEYS or "value" not in row:
            raise UsageError(f"{where} has a row that is not {{filter, value}}: {dict(row)!r}", "see docs/combining.md")
        given = row["value"]
        values = tuple(check(value) for value in (given if isinstance(given, (list, tuple)) else (given,)))
        words = str(row.get("filter") or "")
        if not values:
            raise UsageError(f"{where} has a row without a value", "give it one")
        found.append(("" if words == "*" else words, values))
    if found[-1][0]:
        raise UsageError(f"{where} says nothing for tensors that no filter names", "add a last row without a filter")
    return Setting(tuple(found))


def at(value: Any, name: str, depth: float) -> Any:
    """A value as it counts for one tensor; several, one for each adapter, stay several."""
    if isinstance(value, Setting):
        return value.at(name, depth)
    return tuple(at(one, name, depth) for one in value) if isinstance(value, tuple) else value


def depths(names: Iterable[str]) -> Callable[[str], float]:
    """How deep in its stack of layers each tensor lies, from 0 to 1; 0 outside of layers, and 1 where there is one layer."""
    last: dict[str, int] = {}
    for name in names:
        if match := _LAYER.search(name):
            stack = name[: match.start(1)]
            last[stack] = max(last.get(stack, 0), int(match[1]))

    def depth(name: str) -> float:
        match = _LAYER.search(name)
        if match is None:
            return 0.0
        count = last.get(name[: match.start(1)], 0)
        return int(match[1]) / count if count else 1.0

    return depth
