"""Which adapters a base holds already, as far as records say: one that is folded once more counts twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import AdapterkitError
from adapterkit.provenance.record import adapter_parent, beside_of
from adapterkit.registry.home import open_home
from adapterkit.registry.lineage import ancestors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.places import Address
    from adapterkit.registry.record import Parent, Record

KEEPING = ("merge", "convert")  # operations whose result holds what was folded into their base or source
ROLES = ("base", "source")


def folded_before(base: Path | Address, adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """The adapters that a base holds already: the record beside it says that it is a merge of them, or it is made of such a
    merge, whose record this machine's registry has. The files of adapters are hashed where some merge is known.

    Args:
        base: a folder or a GGUF file, on this disk or in a store.
    """
    record = beside_of(base)
    held = set() if record is None else {parent.content for one in _made_of(record) for parent in _folded(one)}
    return tuple(one.ref for one in adapters if held and not one.whole and adapter_parent(one).content in held)


def _made_of(record: Record) -> list[Record]:
    """The record, and those of what it was made of."""
    if record.operation is None or record.operation.name not in KEEPING:
        return []
    try:
        return [record, *ancestors(open_home(), record, KEEPING, ROLES)]
    except AdapterkitError:  # a registry that is damaged, or newer, is no reason to stop a merge
        return [record]


def _folded(record: Record) -> list[Parent]:
    merged = record.operation is not None and record.operation.name == "merge"
    return [parent for parent in record.parents if merged and parent.role == "adapter"]
