"""``gc``: frees blobs that no visible record names. Only when asked for, and dry unless told to apply.

A blob goes when no readable, visible record names it and it is older than ``keep_days``. It refuses while any record
cannot be read (damaged, or written by a newer adapterkit), since that record may name any blob. Records, aliases, marks
and quarantine are never touched.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from adapterkit import disk
from adapterkit.disk.left import newest
from adapterkit.errors import CheckFailed, NotFound, RegistryError
from adapterkit.registry import store
from adapterkit.registry.home import OLD, Home, entries, open_home, read_file
from adapterkit.registry.names import is_name
from adapterkit.registry.record import FileEntry, Record
from adapterkit.registry.remaking import OPERATIONS, TEMPORARY, can_drop, is_recipe, parent_ref

KEEP_DAYS = 14.0


@dataclass(frozen=True)
class GcReport:
    """What was (``applied``) or would be freed: digests of blobs, their bytes, temporary files and folders; and how many blobs
    are too young.
    """

    applied: bool
    blobs: tuple[str, ...]
    bytes: int
    temporary: int
    young: int


def gc(*, apply: bool = False, keep_days: float = KEEP_DAYS, home: Path | None = None) -> GcReport:
    """Finds (and with ``apply`` deletes) blobs that nothing visible names.

    A removed version keeps its record, and its blobs for ``keep_days`` after the removal.

    Raises:
        CheckFailed: a record cannot be read, so nothing is freed.
        OutputError: others are at work in the registry, or the disk refuses.
    """
    at = open_home(home)
    if not at.exists:
        return GcReport(apply, (), 0, 0, 0)
    with at.store_lock(shared=False):
        now = time.time()
        begun = store.begun(at)
        wanted, killed = _wanted(at, now - keep_days * 86400, begun)
        found: list[tuple[Path, int]] = []
        young = 0
        for folder in entries(at.root / "objects" / "sha256"):
            for entry in entries(Path(folder.path)):
                if entry.name in wanted:
                    continue
                info = entry.stat(follow_symlinks=False)
                # The change time too: it tells when a blob arrived, even when its own time was set back.
                if now - max(info.st_mtime, info.st_ctime) < keep_days * 86400:
                    young += 1
                else:
                    found.append((Path(entry.path), info.st_size))
        temporary = [path for path in _old_temporary(at, now) if path not in {begun[one] for one in killed}]
        if apply:
            with disk.writing("the removal of blobs", at.root):
                for path in [path for path, _ in found] + temporary:
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        os.unlink(path)
    digests = tuple(sorted(path.name for path, _ in found))
    return GcReport(apply, digests, sum(size for _, size in found), len(temporary), young)


@dataclass(frozen=True)
class RecipeSaving:
    """A version that could be kept as its recipe, and the bytes of it that nothing else needs."""

    ref: str
    operation: str
    bytes: int


def recipes(*, home: Path | None = None) -> tuple[RecipeSaving, ...]:
    """What keeping versions as their recipes would save: those that a merge or a conversion made from what is here.

    Whether the bytes come out the same is proved when one is registered so.
    """
    at = open_home(home)
    found: list[tuple[Record, list[FileEntry]]] = []
    needed: dict[str, int] = {}
    for name in at.names():
        hidden = at.hidden_versions(name)
        for version in at.versions(name):
            if version in hidden:
                continue
            try:
                record = store.load_known(at, name, version)
            except (RegistryError, NotFound):
                continue  # fsck tells
            dropped = (
                [file for file in record.files if file.stored and can_drop(file)] if _can_be_made(at, record) else []
            )
            if dropped:
                found.append((record, dropped))
            kept = {file.sha256 for file in dropped}
            for file in record.files:
                if file.stored and file.sha256 not in kept:
                    needed[file.sha256] = file.size
    seen: set[str] = set()
    savings = []
    for record, files in sorted(found, key=lambda one: (one[0].name, one[0].version)):
        saved = {file.sha256: file.size for file in files if file.sha256 not in needed and file.sha256 not in seen}
        seen.update(saved)
        if saved and record.operation is not None:
            savings.append(RecipeSaving(record.ref, record.operation.name, sum(saved.values())))
    return tuple(savings)


def _can_be_made(at: Home, record: Record) -> bool:
    operation = record.operation
    if operation is None or operation.name not in OPERATIONS or not record.parents:
        return False
    for parent in record.parents:
        if parent.content and parent_ref(at, parent.content):
            continue
        identity = parent.identity
        if parent.role == "base" and identity is not None and identity.id and identity.commit:
            continue
        return False
    return True


def _time(mark: Path) -> float:
    """When a version was removed; now, where the mark cannot be read."""
    try:
        return mark.stat().st_mtime
    except OSError:
        return time.time()


def _wanted(at: Home, removed_before: float, begun: Collection[str]) -> tuple[set[str], set[str]]:
    """The digests that stay: all files of visible versions and of those removed lately; and which of ``begun`` tell that
    the last line of a journal is of a killed registration.

    Args:
        begun: digests of the records that killed registrations left in staging.

    Raises:
        CheckFailed: a record cannot be read or is gone.
    """
    wanted: set[str] = set()
    killed: set[str] = set()
    known = set(at.names())
    # The folder is made before the first line of the journal: without it, records are gone and their blobs may be wanted.
    for entry in entries(at.root / "journal"):
        if is_name(entry.name) and entry.name not in known:
            raise CheckFailed(
                f"the records of {entry.name} are gone, and nobody knows which blobs they name", "run fsck"
            )
    for name in sorted(known):
        hidden = at.hidden_versions(name)
        versions = at.versions(name)
        journal = read_file(at.journal(name)) if at.journal(name).is_file() else b""
        lines = journal[: journal.rfind(b"\n") + 1].splitlines()
        # A line that a killed registration left, of a record that never was.
        if (
            len(lines) == len(versions) + 1
            and (last := lines[-1].decode("ascii", "replace").rpartition(" ")[2]) in begun
        ):
            killed.add(last)
            lines.pop()
        if versions != list(range(1, len(versions) + 1)) or len(lines) > len(versions):
            raise CheckFailed(
                f"a record of {name} is missing, and nobody knows which blobs it names",
                "put it back from a copy of the registry, or register the name again to go on without it",
            )
        for version in versions:
            try:
                record = store.load_known(at, name, version)
            except (RegistryError, NotFound) as error:
                raise CheckFailed(
                    f"nothing is freed while a record cannot be read: {error.message}", "run fsck"
                ) from error
            if version not in hidden or _time(at.hidden(name, version)) > removed_before:
                # What can be made again is kept for a while as everything else, and freed then.
                again = is_recipe(record)
                wanted.update(file.sha256 for file in record.files if file.stored or not again)
    return wanted, killed


def _old_temporary(at: Home, now: float) -> list[Path]:
    """Temporary files that no living writer can still use, and folders in which a killed one made versions again."""
    found = [Path(entry.path) for folder in (at.staging, at.incoming, at.pulling) for entry in entries(folder)]
    found += [Path(entry.path) for entry in entries(at.root) if entry.name.startswith(TEMPORARY)]
    return [path for path in found if now - newest(path) > OLD]
