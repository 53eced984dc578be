"""``list``: versions by name, filtered; answered by the index alone where no filter needs a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.registry import index
from adapterkit.registry.base_names import registered_bases
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.index import Unreadable, VersionRow
from adapterkit.registry.names import check_alias

if TYPE_CHECKING:
    from adapterkit.registry.identity import Identity, IdentityComparison
    from adapterkit.registry.record import Record


@dataclass(frozen=True)
class VersionListing:
    """Versions by name, and the records that could not be read; ``bases`` are the registered names of bases by label."""

    rows: tuple[VersionRow, ...]
    unreadable: tuple[Unreadable, ...]
    bases: Mapping[str, str] = field(default_factory=dict)


def listing(
    *,
    name: str = "",
    base: str = "",
    method: str = "",
    kind: str = "",
    alias: str = "",
    evidence: str = "",
    fits: Identity | None = None,
    latest: bool = False,
    hidden: bool = False,
    home: Path | None = None,
) -> VersionListing:
    """The versions that pass every filter given.

    ``name`` is a glob; ``base`` a glob for the base's Hub id, the start of one of its digests, or a reference to a
    registered base; ``evidence`` a kind of evidence that must be there; ``fits`` keeps what was made on a base with
    provably the same weights; ``latest`` keeps the newest version of each name.
    """
    at = open_home(home)
    own = _own_identity(at, base) if base else None

    def ask(found: index.Index) -> VersionListing:
        where, args = ["1"], []
        for column, value in (("kind", kind), ("method", method)):
            if value:
                where.append(f"{column} = ?")
                args.append(value)
        if base:
            where.append("(base_id glob ? or digest in (select digest from levels where own = 0 and value glob ?))")
            args += [base, f"{base}*" if own is None else "\n"]
        if own is not None:
            where[-1] = f"({where[-1]} or {_SAME_BASE})"
            args += [_strongest(own)]
        rows = found.rows(" and ".join(where), tuple(args), hidden)
        if name:
            from fnmatch import fnmatchcase

            rows = [row for row in rows if fnmatchcase(row.name, name)]
        if alias:
            check_alias(alias)
            rows = [row for row in rows if alias in row.aliases]
        if evidence:
            rows = [row for row in rows if evidence in row.evidence]
        if fits is not None:
            rows = [row for row in rows if _fits(found, row, fits)]
        if latest:
            rows = list({row.name: row for row in rows}.values())
        return VersionListing(tuple(rows), found.unreadable(), registered_bases(found))

    return index.ask(at, ask)


_SAME_BASE = "digest in (select digest from levels where own = 0 and value = ?)"


def _own_identity(at: Home, ref: str) -> Identity | None:
    """The identity of a registered model when ``ref`` names one."""
    from adapterkit.registry import resolve

    if not resolve.exists(at, ref.partition("@")[0]):
        return None
    return resolve.find(at, ref).identity


def _strongest(identity: Identity) -> str:
    return next(
        (identity.level(level) for level in ("merkle", "files", "sampled", "commit") if identity.level(level)), "\n"
    )


def _fits(found: index.Index, row: VersionRow, identity: Identity) -> bool:
    from adapterkit.registry import store

    levels = found.base_levels(row.digest)
    same = {level: identity.level(level) == value for level, value in levels.items() if identity.level(level)}
    if not any(same.values()):
        return False
    return compare_base(store.load_known(found.home, row.name, row.version), identity).fits is True


def compare_base(record: Record, identity: Identity) -> IdentityComparison:
    """Whether a base is the one that a version was made on, at the strongest level known of both."""
    from adapterkit.registry.identity import Identity, compare

    return compare(record.base or Identity(), identity, record.base.label if record.base else "", identity.label)
