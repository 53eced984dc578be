"""``register``: files become blobs and a version of a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterkit import disk
from adapterkit.errors import UsageError, option
from adapterkit.registry import blobs, remaking, store
from adapterkit.registry.beside import check_beside, read_beside
from adapterkit.registry.gather import Described, describe, gather
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.identity import Identity
from adapterkit.registry.names import check_name
from adapterkit.registry.record import UNDATED, FileEntry, Operation, Origin, Parent, Record


@dataclass(frozen=True)
class Registered:
    """``new`` is False when the same was registered before; ``stored`` counts bytes that were not in the registry;
    ``warnings`` are sentences on what was not taken over as it was claimed."""

    record: Record
    new: bool
    stored: int
    skipped: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def register(
    path: Path,
    name: str,
    *,
    kind: str = "",
    method: str = "",
    parameters: Mapping[str, Any] | None = None,
    base: Identity | None = None,
    identity: Identity | None = None,
    operation: Operation | None = None,
    parents: Iterable[Parent] = (),
    evidence: Mapping[str, Any] | None = None,
    meta: Mapping[str, str] | None = None,
    origin: Origin | None = None,
    new_version: bool = False,
    link: bool = False,
    ignore_beside: bool = False,
    as_recipe: bool = False,
    made_on: str | Path | None = None,
    home: Path | None = None,
) -> Registered:
    """Stores the files of ``path`` and adds a version of ``name``.

    What is not given is taken from ``adapterkit.json`` beside the files, then from their configuration. ``link`` makes
    hard links instead of copies (see ``blobs``). ``new_version`` adds a version even when nothing changed. ``as_recipe``
    leaves the bytes of large files out, once they came out the same when they were made again (see ``remaking``);
    ``made_on`` is the base for that.

    Raises:
        CheckFailed: ``adapterkit.json`` describes other files than are there.
        UsageError: the kind is neither given nor told by the files.
        OutputError: the disk is full or refuses.
    """
    check_name(name)
    gathered = gather(path)
    beside = None if ignore_beside else read_beside(path)
    told = describe(path) if path.is_dir() and beside is None else Described()
    kind = kind or (beside.kind if beside else told.kind)
    if not kind:
        raise UsageError(
            f"{path} does not tell what it is", f"say it with {option('kind')} adapter, merged, combined or quantized"
        )
    at = open_home(home)
    at.create()
    dropped: set[str] = set()
    if as_recipe:
        dropped = _proved(at, path, name, beside, gathered.files, made_on)
    with at.store_lock(shared=True):
        entries, stored = [], 0
        for inside, real in gathered.files:
            if inside in dropped:
                digest, nbytes = disk.hash_file(real)
                entries.append(FileEntry(inside, nbytes, digest, stored=False))
                continue
            blob = blobs.put_file(at, real, link)
            entries.append(FileEntry(inside, blob.size, blob.sha256))
            stored += blob.size if blob.new else 0
        if beside is not None:
            check_beside(path, beside, entries)
        draft = Record(
            kind=kind,
            files=tuple(entries),
            method=method or (beside.method if beside else told.method),
            parameters=parameters or (beside.parameters if beside else dict(told.parameters)),
            base=base or (beside.base if beside else told.base),
            identity=identity or (beside.identity if beside else None),
            operation=operation or (beside.operation if beside else None),
            parents=tuple(parents) or (beside.parents if beside else ()),
            evidence={**(beside.evidence if beside else {}), **(evidence or {})},
            meta={**(beside.meta if beside else {}), **(meta or {})},
            origin=origin or (beside.origin if beside else None),
            created=beside.created if beside and beside.created != UNDATED else "",
        )
        added = store.add_record(at, draft, name, new_version)
    return Registered(added.record, added.new, stored, gathered.skipped)


def _proved(
    at: Home,
    path: Path,
    name: str,
    beside: Record | None,
    files: Iterable[tuple[str, Path]],
    base: str | Path | None,
) -> set[str]:
    """The files that need not be kept, after they were made again with the same bytes.

    Raises:
        UsageError, CheckFailed, NotFound: see `remaking.made_again`.
    """
    if beside is None or beside.operation is None:
        raise UsageError(f"nothing says how {path} was made", "outputs of merge and convert have a record beside them")
    entries = []
    for inside, real in files:
        digest, nbytes = disk.hash_file(real)
        entries.append(FileEntry(inside, nbytes, digest))
    draft = replace(beside, files=tuple(entries))
    with remaking.made_again(at, draft, base):
        return {file.path for file in entries if remaking.can_drop(file)}


def register_base(
    identity: Identity,
    name: str,
    *,
    method: str = "",
    parents: Iterable[Parent] = (),
    meta: Mapping[str, str] | None = None,
    new_version: bool = False,
    home: Path | None = None,
) -> Registered:
    """Adds a reference to a base: its identity, no bytes.

    Raises:
        RegistryError: nothing is known about the base.
    """
    files = tuple(FileEntry(path, 0, digest, stored=False) for path, digest in identity.files)
    draft = Record("base", files, method=method, identity=identity, parents=tuple(parents), meta=meta or {})
    return _add(draft, name, new_version, home)


def register_record(record: Record, name: str, *, new_version: bool = False, home: Path | None = None) -> Registered:
    """Adds a finished record whose blobs are stored already (or marked as not stored)."""
    return _add(replace(record, name="", version=0), name, new_version, home)


def _add(draft: Record, name: str, new_version: bool, home: Path | None) -> Registered:
    check_name(name)
    at = open_home(home)
    at.create()
    with at.store_lock(shared=True):
        added = store.add_record(at, draft, name, new_version)
    return Registered(added.record, added.new, 0, ())
