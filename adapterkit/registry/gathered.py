"""Everything that is known of a version, whoever attached it: evidence is about bytes, so a version has the evidence of every
version in sight with the same content."""

from __future__ import annotations

from typing import Any

from adapterkit.errors import NotFound, RegistryError
from adapterkit.registry import index, store
from adapterkit.registry.figures import joined
from adapterkit.registry.home import Home
from adapterkit.registry.record import Record


def gathered(home: Home, record: Record) -> dict[str, Any]:
    """The evidence of every version in sight that has this content, the later figures over the earlier, and the record's
    own where nothing later says the same."""
    versions = [record]
    for row in index.ask(home, lambda found: found.by_content(record.content)):
        if row.hidden or row.digest == record.digest:
            continue
        try:
            versions.append(store.load_known(home, row.name, row.version))
        except (RegistryError, NotFound):
            continue  # fsck tells
    return joined(versions)


def base_evidence(home: Home, record: Record) -> dict[str, Any]:
    """The evidence of the registered base of a version; nothing where it has none."""
    base = record.base
    if base is None:
        return {}
    rows = index.ask(
        home, lambda found: [row for row in found.by_identity(base) if row.kind == "base" and not row.hidden]
    )
    return joined(store.load_known(home, row.name, row.version) for row in rows)
