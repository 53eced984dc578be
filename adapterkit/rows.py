"""Tables whose rows are files: a file that is put into the package brings its row with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any


def brought(package: str, path: Sequence[str], attribute: str, known: Collection[str] = ()) -> Iterator[Any]:
    """What the modules of a package have under ``attribute``, in the order of their names.

    Args:
        package, path: ``__package__`` and ``__path__`` of the package.
        known: modules that the table has already, or that are no rows; they are not imported.
    """
    from pkgutil import iter_modules

    for module in iter_modules(path):
        if module.name not in known and not module.name.startswith("_"):
            found = getattr(import_module(f"{package}.{module.name}"), attribute, None)
            if found is not None:
                yield found


_HANDED_IN: dict[str, list[Callable[[], Iterable[Any]]]] = {}


def hand_in(table: str, rows: Callable[[], Iterable[Any]]) -> None:
    """Give a table rows of a layer above it, which it cannot import; ``rows`` is called when the table is asked for."""
    _HANDED_IN.setdefault(table, []).append(rows)


def handed_in(table: str) -> Iterator[Any]:
    """The rows that were handed in for a table."""
    for rows in _HANDED_IN.get(table, ()):
        yield from rows()
