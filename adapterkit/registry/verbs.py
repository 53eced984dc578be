"""One function per command of the registry; each returns a frozen value that the command line only prints.

``home`` is a folder (default: ``$ADAPTERKIT_HOME``, else the user's data folder). References are described in
``resolve``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import CheckFailed, NotFound, UsageError
from adapterkit.registry import blobs, index, refs, resolve, store
from adapterkit.registry.base_names import base_shown, registered_bases
from adapterkit.registry.chain import who
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.names import LATEST, check_alias
from adapterkit.registry.record import (
    Record,
)
from adapterkit.registry.refs import ANY, Move, Tagged


@dataclass(frozen=True)
class Shown:
    """One version: its record, its aliases, all versions of its name, the files whose bytes are not here, and what its base
    is called here."""

    record: Record
    aliases: tuple[str, ...]
    versions: tuple[int, ...]
    hidden: bool
    missing: tuple[str, ...]
    base: str = ""


@dataclass(frozen=True)
class Removed:
    """A version that is out of sight (or back in it); ``changed`` is False when it was so before."""

    name: str
    version: int
    changed: bool


def show(ref: str, *, home: Path | None = None) -> Shown:
    """One version with what belongs to it; read from the files."""
    at = open_home(home)
    record = resolve.find(at, ref)
    hidden = at.hidden_versions(record.name)
    missing = [file.path for file in record.files if file.stored and not blobs.has(at, file.sha256, file.size)]
    return Shown(
        record,
        tuple(aliases(at, record.name, record.version)),
        tuple(version for version in at.versions(record.name) if version not in hidden),
        record.version in hidden,
        tuple(missing),
        base_shown(record, index.ask(at, registered_bases) if record.base is not None else {}),
    )


def aliases(at: Home, name: str, version: int) -> list[str]:
    """The aliases that point to a version."""
    found = ((alias, refs.get(at, name, alias)) for alias in at.alias_names(name))
    return [alias for alias, move in found if move and move.version == version]


def tag(
    ref: str,
    alias: str,
    *,
    expected: int = ANY,
    why: str = "",
    by: str = "",
    require: str = "",
    dry_run: bool = False,
    home: Path | None = None,
) -> Tagged:
    """Points ``alias`` of the name in ``ref`` to the version that ``ref`` means, if what is asked for holds.

    ``expected`` makes it a compare-and-swap: the version it must be at now, 0 for none. ``why`` and ``by`` (by default
    whoever runs this) are kept with the move.

    Args:
        require: conditions (see ``policy``) that have to hold beside the policies that are kept for the alias.
        dry_run: ask, and move nothing.

    Raises:
        CheckFailed: the alias is somewhere else than expected; or a condition does not hold.
        UsageError: a condition cannot be read.
    """
    from adapterkit.registry.policies import gate_of

    check_alias(alias)
    at = open_home(home)
    record = resolve.find(at, ref)
    if record.version in at.hidden_versions(record.name):
        raise UsageError(f"{record.ref} was removed and gets no alias", "bring it back with restore first")
    gate = gate_of(at, record, alias, require)
    if dry_run:
        now = refs.get(at, record.name, alias)
        held = tuple(gate(now)) if gate is not None else ()
        return Tagged(record.name, alias, record.version, record.digest, now.version if now else 0, False, held)
    return refs.move(
        at, record.name, alias, record.version, record.digest, expected, by=by or who(), why=why, gate=gate
    )


def untag(
    name: str, alias: str, *, expected: int = ANY, why: str = "", by: str = "", home: Path | None = None
) -> Tagged:
    """Takes an alias off; its history stays.

    Raises:
        NotFound: there is no such alias.
    """
    at = open_home(home)
    refs.require(refs.get(at, name, alias), name, alias)
    return refs.move(at, name, alias, 0, "", expected, by=by or who(), why=why)


def rollback(
    name: str, alias: str, *, expected: int = ANY, why: str = "", by: str = "", home: Path | None = None
) -> Tagged:
    """Takes the last move of an alias back: it points to where it was before. A second one goes further back.

    No policy is asked: the version was at this alias before, and a way back must not depend on today's rules.

    Raises:
        NotFound: there is no alias, or nothing before the last move.
        CheckFailed: the version was removed, or somebody moved the alias meanwhile.
    """
    at = open_home(home)
    known = refs.history(at, name, alias)
    moves = refs.standing(known)
    if not moves:
        raise NotFound(f"{name} has no alias '{alias}'", "show lists its aliases")
    if len(moves) < 2:
        raise NotFound(f"{name}@{alias} was never anywhere else than now", "there is nothing to go back to")
    last, target = moves[-1], moves[-2]
    if target.version in at.hidden_versions(name):
        raise CheckFailed(
            f"{name}@{target.version}, where {name}@{alias} was before, was removed", "bring it back with restore first"
        )
    store.load(at, name, target.version)
    return refs.move(
        at,
        name,
        alias,
        target.version,
        target.digest,
        last.version if expected == ANY else expected,
        by=by or who(),
        why=why,
        undoes=last.seq,
        after=known[-1].seq,
    )


def alias_now(name: str, alias: str, *, home: Path | None = None) -> Move | None:
    """Where an alias is: version, digest of the record, since when (``at``), by whom; None when it points nowhere."""
    return refs.get(open_home(home), name, alias)


def alias_before(name: str, alias: str, *, home: Path | None = None) -> Move | None:
    """The move that a rollback would go back to; None when there is none."""
    moves = refs.standing(refs.history(open_home(home), name, alias))
    return moves[-2] if len(moves) > 1 else None


def history(name: str, alias: str, *, home: Path | None = None) -> tuple[Move, ...]:
    """Every move of an alias, oldest first."""
    return refs.history(open_home(home), name, alias)


def remove(ref: str, *, reason: str = "", home: Path | None = None) -> Removed:
    """Takes a version out of sight. Nothing is deleted: ``restore`` brings it back until gc was asked to free its
    blobs.

    Raises:
        UsageError: the reference names no version, or an alias points to it.
    """
    at = open_home(home)
    if "@" not in ref and not ref.startswith("sha256:"):
        raise UsageError(f"remove takes one version, and '{ref}' names none", f"say {ref}@{LATEST} or {ref}@1")
    name, version, _ = resolve.resolve(at, ref)
    if held := aliases(at, name, version):
        raise UsageError(
            f"{name}@{version} is what the alias '{held[0]}' points to", f"run untag {name} {held[0]} first"
        )
    return Removed(name, version, store.hide(at, name, version, reason))


def restore(ref: str, *, home: Path | None = None) -> Removed:
    """Brings a removed version back into sight; ``ref`` is ``name@number`` or a digest."""
    at = open_home(home)
    name, version, _ = resolve.resolve(at, ref)
    return Removed(name, version, store.unhide(at, name, version))
