"""Records on disk: added under contiguous versions, read and checked, hidden and shown again. Never changed, never
deleted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit import disk
from adapterkit.errors import NotFound, RegistryError
from adapterkit.registry import blobs
from adapterkit.registry.canonical import canonical, parse, sha256
from adapterkit.registry.home import Home, entries, read_file
from adapterkit.registry.record import OpaqueRecord, Record, now, read

_JOURNAL_LINE = rb"([1-9][0-9]{0,9}) ([0-9a-f]{64}) ([0-9a-f]{64})\n"
_JOURNAL = rb"(?:[1-9][0-9]{0,9} [0-9a-f]{64} [0-9a-f]{64}\n)*"
UNKNOWN = "0" * 64


@dataclass(frozen=True)
class Added:
    """A record in the registry; ``new`` is False when the same body was there already."""

    record: Record
    new: bool


def add_record(home: Home, draft: Record, name: str, new_version: bool = False) -> Added:
    """Gives ``draft`` the next version of ``name`` and writes it, or finds the visible version with the same body.

    Call it under ``home.store_lock(shared=True)`` with the blobs already stored.

    Raises:
        RegistryError: a file that is marked as stored has no blob.
        OutputError: the disk is full or refuses.
    """
    for file in draft.files:
        if file.stored and not blobs.has(home, file.sha256, file.size):
            raise RegistryError(f"{file.path} has no blob {file.sha256[:12]} in {home.root}", "store its bytes first")
    home.records(name)  # The name is checked before any lock or folder is made from it.
    with disk.writing(f"a record of {name}", home.root), home.lock(name):
        return _add(home, draft, name, new_version)


def extend_record(
    home: Home, name: str, content: str, change: Callable[[list[Record]], Record], others: Collection[int] = ()
) -> Added:
    """Gives the next version of ``name`` to what ``change`` makes of the visible versions that have ``content`` (oldest
    first, read under the name's lock, so that of two who extend at once neither loses what the other added).

    Call it under ``home.store_lock(shared=True)``.

    Args:
        others: versions that are known to have other content, and are not read.

    Raises:
        RegistryError: the journal or a record is damaged.
        OutputError: the disk is full or refuses.
    """
    known: dict[int, Record] = {}

    def there() -> list[Record]:
        hidden = home.hidden_versions(name)
        shown = [version for version in home.versions(name) if version not in others and version not in hidden]
        for version in shown:
            if version not in known:
                with suppress(RegistryError, NotFound):  # fsck tells
                    known[version] = load_known(home, name, version)
        return [known[version] for version in shown if version in known and known[version].content == content]

    there()  # what is read before the lock is not read under it, where others wait
    with disk.writing(f"a record of {name}", home.root), home.lock(name):
        return _add(home, change(there()), name, False)


def _add(home: Home, draft: Record, name: str, new_version: bool) -> Added:
    """``add_record`` for a caller that holds the name's lock."""
    journal = _healed_journal(home, name)
    if not new_version and (found := _same_body(home, name, journal, draft.body)):
        return Added(found, False)
    disk.make_folder(home.records(name))
    while True:
        version = journal.count(b"\n") + 1
        record = draft.registered(name, version)
        line = b"%d %s %s\n" % (version, record.body.encode(), record.digest.encode())
        with disk.staged(home.staging, record.data) as temporary:
            try:
                _append(home, name, line, len(journal))
                if disk.publish_new(temporary, home.record(name, version)):
                    return Added(record, True)
            except BaseException:
                # The staged record goes now, and without it the line would speak of a record that was lost.
                _append(home, name, b"", len(journal))
                raise
        # Only where locks do not work: somebody else took the number.
        journal = rebuilt_journal(home, name)


def begun(home: Home) -> dict[str, Path]:
    """Staged records by their digest. A registration that was killed leaves one, which tells the last line of its journal
    from the line of a record that was lost."""
    found: dict[str, Path] = {}
    for entry in entries(home.staging):
        with suppress(RegistryError, FileNotFoundError):
            found[read(read_file(Path(entry.path)), entry.path).digest] = Path(entry.path)
    return found


def heal(home: Home, record: Record) -> bool:
    """Puts a record back in the place of its damaged file, when the journal says that exactly this one was there.

    The damaged file goes to quarantine. False when nothing was damaged or the journal names another digest.
    """
    path = home.record(record.name, record.version)
    try:
        load(home, record.name, record.version)
        return False
    except NotFound:
        return False
    except RegistryError:
        pass
    with disk.writing(f"{record.name}@{record.version}", home.root), home.lock(record.name):
        journal = home.journal(record.name)
        lines = (journal_lines(read_file(journal)) if journal.exists() else None) or []
        if record.version > len(lines) or lines[record.version - 1][2] != record.digest:
            return False
        with disk.staged(home.staging, record.data) as temporary:
            blobs.set_aside(home, path, "damaged")
            return disk.publish_new(temporary, path)


def load(home: Home, name: str, version: int) -> Record | OpaqueRecord:
    """The record of one version, checked against its own digest and its place.

    Raises:
        NotFound: there is no such version.
        RegistryError: it is damaged or in the wrong place.
    """
    path = home.record(name, version)
    try:
        data = read_file(path)
    except FileNotFoundError:
        raise NotFound(f"{name}@{version} is not in the registry {home.root}", "list shows what is") from None
    record = read(data, str(path))
    if (record.name, record.version) != (name, version):
        raise RegistryError(f"{path} holds {record.name}@{record.version}", "it was moved there; put it back")
    return record


def load_known(home: Home, name: str, version: int) -> Record:
    """Like ``load``, for callers that need the fields.

    Raises:
        RegistryError: also when the record was written by a newer adapterkit.
    """
    record = load(home, name, version)
    if isinstance(record, OpaqueRecord):
        raise RegistryError(
            f"{name}@{version} was written by a newer adapterkit (schema {record.schema})", "upgrade adapterkit"
        )
    return record


def hide(home: Home, name: str, version: int, reason: str = "") -> bool:
    """Marks a version as removed; False when it was. The record and its blobs stay."""
    if not home.record(name, version).exists():
        raise NotFound(f"{name}@{version} is not in the registry {home.root}", "list shows what is")
    mark = home.hidden(name, version)
    with disk.writing(f"the removal of {name}@{version}", home.root), home.lock(name):
        disk.make_folder(mark.parent)
        with disk.staged(home.staging, mark_bytes(name, version, reason)) as temporary:
            return disk.publish_new(temporary, mark)


def unhide(home: Home, name: str, version: int) -> bool:
    """Takes the mark of removal away; False when there was none."""
    mark = home.hidden(name, version)
    # The passing file in staging tells an index that something changed.
    with disk.writing(f"the return of {name}@{version}", home.root), home.lock(name), disk.staged(home.staging, b""):
        try:
            mark.unlink()
        except FileNotFoundError:
            return False
        disk.sync_folder(mark.parent)
        return True


def mark_bytes(name: str, version: int, reason: str, at: str = "") -> bytes:
    """The content of a mark of removal, with its own sum."""
    plain = {"name": name, "version": version, "reason": reason, "at": at or now()}
    return canonical({**plain, "sum": sha256(canonical(plain))}) + b"\n"


def check_mark(data: bytes, name: str, version: int, where: str) -> None:
    """
    Raises:
        RegistryError: the mark is damaged or in the wrong place.
    """
    value = parse(data, where)
    try:
        right = mark_bytes(name, version, value["reason"], value["at"])
    except (TypeError, KeyError, ValueError):
        right = b""
    if right != data:
        raise RegistryError(f"{where} is damaged", "remove hides the version again")


def journal_lines(data: bytes) -> list[tuple[int, str, str]] | None:
    """The ``(version, body, digest)`` lines of a journal; None unless they are whole and count from 1."""
    if not re.fullmatch(_JOURNAL, data):
        return None
    found = [(int(n), body.decode(), digest.decode()) for n, body, digest in re.findall(_JOURNAL_LINE, data)]
    return found if all(n == place for place, (n, _, _) in enumerate(found, 1)) else None


def _healed_journal(home: Home, name: str) -> bytes:
    """The journal without the line of a registration that was killed, and with lines for records that lack one."""
    try:
        data = read_file(home.journal(name))
    except FileNotFoundError:
        data = b""
    except RegistryError:
        return rebuilt_journal(home, name)
    whole = data[: data.rfind(b"\n") + 1]
    count = whole.count(b"\n")
    tidy = re.fullmatch(_JOURNAL, whole) and (
        not whole or whole[whole[:-1].rfind(b"\n") + 1 :].startswith(b"%d " % count)
    )
    if not tidy:
        return rebuilt_journal(home, name)
    if count and not home.record(name, count).exists():
        if count > 1 and not home.record(name, count - 1).exists():
            return rebuilt_journal(home, name)
        whole = whole[: whole[:-1].rfind(b"\n") + 1]
        count -= 1
    if home.record(name, count + 1).exists():
        return rebuilt_journal(home, name)
    return whole


def rebuilt_journal(home: Home, name: str) -> bytes:
    """Writes the journal anew from the records, with zeros for one that cannot be read; the old one goes to quarantine.

    The caller holds the name's lock.
    """
    lines = []
    on_disk = home.versions(name)
    for version in range(1, (on_disk[-1] if on_disk else 0) + 1):
        body = digest = UNKNOWN
        try:
            record = load(home, name, version)
            digest = record.digest
            body = record.body if isinstance(record, Record) else UNKNOWN
        except (NotFound, RegistryError):
            pass
        lines.append(b"%d %s %s\n" % (version, body.encode(), digest.encode()))
    data = b"".join(lines)
    path = home.journal(name)
    if os.path.lexists(path) and not _holds(path, data):
        blobs.set_aside(home, path, "journal")
    with disk.staged(home.staging, data) as temporary:
        disk.publish_over(temporary, path)
    return data


def _holds(path: Path, data: bytes) -> bool:
    try:
        return read_file(path) == data
    except (FileNotFoundError, RegistryError):
        return False


def _append(home: Home, name: str, line: bytes, offset: int) -> None:
    """Puts ``line`` at ``offset`` of the journal and cuts what a killed writer left behind it.

    Not fsynced: after a power cut the journal is healed from the records.
    """
    fd = os.open(
        home.journal(name),
        os.O_WRONLY | os.O_CREAT | disk.calls.flags("CLOEXEC", "NOFOLLOW", "NONBLOCK", "BINARY"),
        0o644,
    )
    try:
        os.ftruncate(fd, offset)
        os.lseek(fd, offset, os.SEEK_SET)
        disk.write_all(fd, line)
    finally:
        os.close(fd)


def _same_body(home: Home, name: str, journal: bytes, body: str) -> Record | None:
    """The newest visible record with this body, read and checked."""
    needle = b" %s " % body.encode()
    place = journal.rfind(needle)
    hidden = home.hidden_versions(name) if place >= 0 else set()
    while place >= 0:
        version = journal.count(b"\n", 0, place) + 1
        if version not in hidden:
            try:
                record = load(home, name, version)
                if isinstance(record, Record) and record.body == body:
                    return replace(record)
            except (NotFound, RegistryError):
                pass
        place = journal.rfind(needle, 0, place)
    return None
