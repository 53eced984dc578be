"""Is this the base that an adapter was trained on? By what its record says of the base, cheapest evidence first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.checkpoint.folder import RECORD
from adapterkit.checkpoint.open import locate
from adapterkit.errors import AdapterkitError

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.registry.identity import Identity, IdentityComparison
    from adapterkit.registry.record import Record


def record_of(adapter: Adapter) -> Record | None:
    """The record of an adapter: the registry's, or ``adapterkit.json`` beside it; None if there is none to be read."""
    try:
        if adapter.source.path is not None:
            if adapter.folder is None or not (adapter.folder / RECORD).exists():
                return None
            from adapterkit.registry.beside import read_beside

            return read_beside(adapter.folder)
        listing = locate(adapter.ref, headers_only=True)
        if RECORD not in listing.names:
            return None
        from adapterkit.registry.record import OpaqueRecord, read

        source = listing.open(RECORD)
        found = read(source.read(0, source.size), source.name, exact=False)
        return None if isinstance(found, OpaqueRecord) else found
    except AdapterkitError:
        return None


def compare_bases(adapter: Adapter, base: Checkpoint, *, full: bool = False) -> IdentityComparison | None:
    """What is proved about the base given and the one recorded; None when nothing is recorded.

    Headers, then the Hub's own digests, then at most 512 KiB of the weights (16 KiB of each tensor where they are local,
    all of it with ``full``), and no more than is needed.

    Raises:
        AuthError, HubError, CheckpointError: the base cannot be read.
    """
    record = record_of(adapter)
    if record is None or record.base is None or not record.base.known:
        return None
    return compare_base(record.base, base, full=full)


def compare_base(said: Identity, base: Checkpoint, *, full: bool = False) -> IdentityComparison:
    """The same for the identity that a record states."""
    from adapterkit.registry.weights import identity_of

    found = identity_of(base, "skeleton")
    comparison = _compare(said, found, base)
    if comparison.verdict in ("same", "misfit"):
        return comparison
    if said.files and not found.files and found.id and found.commit:
        found = identity_of(base, "skeleton", hub_files=True)
        comparison = _compare(said, found, base)
        if comparison.verdict == "same":
            return comparison
    level = _next(said, base, full)
    return _compare(said, identity_of(base, level), base) if level else comparison


def _next(said: Identity, base: Checkpoint, full: bool) -> str:
    """The strongest level that is recorded and may be read."""
    from adapterkit.registry.weights import cheap

    affordable = cheap(base)
    if affordable == "skeleton":
        return ""
    if full and said.merkle:
        return "merkle"
    if said.sampled and affordable == "sampled":
        return "sampled"
    return "probe" if said.probe else ""


def _compare(said: Identity, found: Identity, base: Checkpoint) -> IdentityComparison:
    from adapterkit.registry.identity import compare

    return compare(said, found, said.label, found.label if found.id else base.ref)
