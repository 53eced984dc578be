"""References: ``name``, ``name@3``, ``name@prod``, ``name@latest``, ``sha256:abcd...`` and bare hex of 12 digits or
more.

Names, versions and aliases are looked up in the files; only digests need the index.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from adapterkit.errors import NotFound, RegistryError, UsageError, nearest
from adapterkit.registry import index, refs, store
from adapterkit.registry.home import Home, is_number
from adapterkit.registry.names import LATEST, check_alias, check_name, is_name
from adapterkit.registry.record import Record

_HEX = r"[0-9a-f]{4,64}"
_BARE = 12


class ResolvedVersion(NamedTuple):
    """What a reference means; ``digest`` is the one the alias was set to, empty when there was no alias."""

    name: str
    version: int
    digest: str = ""


def split(ref: str) -> tuple[str, str]:
    """``(name, version or alias)`` of a reference, the second empty when it is not given.

    Raises:
        UsageError, UnsafeError: a part cannot be a name.
    """
    name, at, rest = ref.partition("@")
    check_name(name)
    if at and not is_number(rest) and rest != LATEST:
        check_alias(rest)
    return name, rest


def resolve(home: Home, ref: str) -> ResolvedVersion:
    """The name and version that a reference means; a removed version only by number or digest.

    Raises:
        NotFound: nothing has that name, version, alias or digest.
        UsageError: it is not a reference, or a digest that several versions share.
    """
    prefix = ref[7:] if ref.startswith("sha256:") else ""
    if prefix:
        if not re.fullmatch(_HEX, prefix):
            raise UsageError(f"{ref!a} is not a digest", "give 4 to 64 hex digits after 'sha256:'")
        return by_digest(home, prefix)
    name, rest = split(ref)
    if is_number(rest):
        if not home.record(name, int(rest)).exists():
            raise _missing(home, name, rest)
        return ResolvedVersion(name, int(rest))
    if rest and rest != LATEST:
        if not home.versions(name):
            raise _missing(home, name, rest)
        move = refs.require(refs.get(home, name, rest), name, rest)
        return ResolvedVersion(name, move.version, move.digest)
    visible = [version for version in home.versions(name) if version not in home.hidden_versions(name)]
    if visible:
        return ResolvedVersion(name, visible[-1])
    if not rest and len(ref) >= _BARE and re.fullmatch(_HEX, ref):
        return by_digest(home, ref)
    raise _missing(home, name, "")


def by_digest(home: Home, prefix: str) -> ResolvedVersion:
    """The version whose record, content or file has a digest that starts with ``prefix``.

    Several versions with the same artefact are no question: the newest visible one of a single name is meant.

    Raises:
        NotFound: there is none.
        UsageError: there are several artefacts or names.
    """
    rows = index.ask(home, lambda found: found.by_prefix(prefix))
    if not rows:
        raise NotFound(f"no record, content or file in {home.root} has a digest that starts with {prefix}")
    shown = [row for row in rows if not row.hidden] or rows
    if len({row.name for row in shown}) > 1 or len({row.content for row in shown}) > 1:
        some = ", ".join(f"{row.name}@{row.version}" for row in shown[:5])
        raise UsageError(f"{prefix} is the start of several digests ({some})", "give more digits or a name")
    return ResolvedVersion(shown[-1].name, shown[-1].version)


def find(home: Home, ref: str) -> Record:
    """The record that a reference means, read from its file and checked.

    Raises:
        NotFound, UsageError: as in ``resolve``.
        RegistryError: the record is damaged or newer than this version; or the alias means another record than it says.
    """
    target = resolve(home, ref)
    record = store.load_known(home, target.name, target.version)
    if target.digest not in ("", record.digest):
        raise RegistryError(f"{ref} was set to another record than {record.ref} is now", "run fsck")
    return record


def exists(home: Home, name: str) -> bool:
    """Whether ``name`` has at least one version that is not removed; False for anything that is not a name."""
    return is_name(name) and bool(set(home.versions(name)) - home.hidden_versions(name))


def _missing(home: Home, name: str, version: str) -> NotFound:
    known = home.versions(name)
    if not known:
        if Path(name).is_dir():
            return NotFound(f"'{name}' is a folder here, and not in the registry {home.root}", f"register {name} first")
        return NotFound(f"'{name}' is not in the registry {home.root}", _near(name, home.names()))
    if not version:
        return NotFound(f"every version of '{name}' was removed", f"show {name}@{known[-1]} still works")
    return NotFound(f"{name} has no version {version}; its newest is {known[-1]}", "show lists its versions")


def _near(name: str, known: Iterable[str]) -> str:
    """What to do about a name that is not there: the one that is most like it, if one is."""
    return nearest(name, known, "list shows what is")
