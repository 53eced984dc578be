"""``gc``: frees blobs that no visible record names. Only when asked for, and dry unless told to apply.

A blob goes when no readable, visible record names it and it is older than ``keep_days``. It refuses while any record
cannot be read (damaged, or written by a newer adapterkit), since that record may name any blob. Records, aliases, marks
and quarantine are never touched.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from adapterkit import disk
from adapterkit.errors import CheckFailed, NotFound, RegistryError
from adapterkit.registry import store
from adapterkit.registry.home import Home, entries, open_home, read_file
from adapterkit.registry.names import is_name

KEEP_DAYS = 14.0
_TEMPORARY_SECONDS = 86400.0


@dataclass(frozen=True)
class GcReport:
    """What was (``applied``) or would be freed: digests of blobs, their bytes, temporary files; what is too young."""

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
        wanted = _wanted(at, now - keep_days * 86400)
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
        temporary = _old_temporary(at, now)
        if apply:
            with disk.writing("the removal of blobs", at.root):
                for path in [path for path, _ in found] + temporary:
                    os.unlink(path)
    digests = tuple(sorted(path.name for path, _ in found))
    return GcReport(apply, digests, sum(size for _, size in found), len(temporary), young)


def _time(mark: Path) -> float:
    """When a version was removed; now, where the mark cannot be read."""
    try:
        return mark.stat().st_mtime
    except OSError:
        return time.time()


def _wanted(at: Home, removed_before: float) -> set[str]:
    """The digests that stay: all files of visible versions and of those removed lately."""
    wanted: set[str] = set()
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
        lines = read_file(at.journal(name)).count(b"\n") if at.journal(name).is_file() else 0
        # One line more than records is a registration that was killed.
        if versions != list(range(1, len(versions) + 1)) or lines > len(versions) + 1:
            raise CheckFailed(f"a record of {name} is missing, and nobody knows which blobs it names", "run fsck")
        for version in versions:
            try:
                record = store.load_known(at, name, version)
            except (RegistryError, NotFound) as error:
                raise CheckFailed(
                    f"nothing is freed while a record cannot be read: {error.message}", "run fsck"
                ) from error
            if version not in hidden or _time(at.hidden(name, version)) > removed_before:
                wanted.update(file.sha256 for file in record.files)
    return wanted


def _old_temporary(at: Home, now: float) -> list[Path]:
    """Temporary files that no living writer can still use."""
    found = [Path(entry.path) for folder in (at.staging, at.incoming) for entry in entries(folder)]
    return [path for path in found if now - path.lstat().st_mtime > _TEMPORARY_SECONDS]
