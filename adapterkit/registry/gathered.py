"""Everything that is known of a version, whoever attached it: evidence is about bytes, so a version has the evidence of every
version in sight with the same content."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from adapterkit.errors import NotFound, RegistryError
from adapterkit.registry import index, store
from adapterkit.registry.figures import joined
from adapterkit.registry.home import Home
from adapterkit.registry.record import Record


def gathered(home: Home, record: Record, known: dict[str, Record] | None = None) -> dict[str, Any]:
    """The evidence of every version in sight that has this content, the later figures over the earlier, and the record's
    own where nothing later says the same.

    Args:
        known: records by digest that need not be read again; what is read is added.
    """
    return joined(same_content(home, record, index.ask(home, lambda found: found.places(record.content)), known))


def same_content(
    home: Home, record: Record, places: Iterable[tuple[str, int, str]], known: dict[str, Record] | None = None
) -> list[Record]:
    """A record and those at ``places`` (see `Index.places`); one that cannot be read is left out."""
    found, known = [record], {} if known is None else known
    for name, version, digest in places:
        if digest == record.digest:
            continue
        if digest not in known:
            try:
                known[digest] = store.load_known(home, name, version)
            except (RegistryError, NotFound):
                continue  # fsck tells
        found.append(known[digest])
    return found


def base_evidence(home: Home, record: Record) -> dict[str, Any]:
    """The evidence of the registered base of a version; nothing where it has none."""
    base = record.base
    if base is None:
        return {}
    rows = index.ask(
        home, lambda found: [row for row in found.by_identity(base) if row.kind == "base" and not row.hidden]
    )
    return joined(store.load_known(home, row.name, row.version) for row in rows)
